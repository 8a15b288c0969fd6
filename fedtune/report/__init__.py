"""Pages about runs: one file of HTML that opens without a network, with pictures, tables and what they mean.

The pictures are Matplotlib's, as SVG. Compared were Plotly, Bokeh and Vega-Altair, which add hover and zoom,
and for that put 1 to 4.5 MB of JavaScript into every page. Without them a run's page is about 150 KB, prints
as vectors and opens where scripts are forbidden; its text is text to a screen reader and to a search. Light
and dark are one file, since the colours are CSS variables (picture.py). What a hover would say stands in a
table below each picture.
"""

from fedtune.report.write import csv_files, png_files, write_report

__all__ = ["csv_files", "png_files", "write_report"]
