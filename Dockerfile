# Images of a coordinator (target server) and of a site (target client). For the CPU, with PyTorch's index of CPU builds (its installation page names it):
#   docker build --target server -t fedtune-server --build-arg TORCH_INDEX=URL .
# Without TORCH_INDEX torch comes from pip's own index, with CUDA and several GB more; the driver comes from the host: docker run --gpus all
#   docker build --target client -t fedtune-client:cuda .
# Without a network: pip wheel -c constraints.txt -w wheels torch '.[flower,zeroth,parquet,demo]' hatchling, elsewhere; a folder wheels/ is used if it is there.
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM scratch AS wheels
COPY constraints.txt wheel[s] /

# --- everything but fedtune itself: made anew only when pyproject.toml or constraints.txt change -------------------------
FROM ${BASE_IMAGE} AS packages
ARG TORCH_INDEX=
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
RUN python3 -m venv /opt/fedtune && python3 -m venv /opt/tools
COPY docker/requirements.py pyproject.toml constraints.txt /src/
WORKDIR /src
RUN --mount=type=bind,from=wheels,target=/wheels \
    if ls /wheels/*.whl > /dev/null 2>&1; then set -- --no-index --find-links /wheels; elif [ -n "$TORCH_INDEX" ]; then set -- --no-deps --index-url "$TORCH_INDEX"; else set --; fi \
 && /opt/fedtune/bin/pip install "$@" "$(grep '^torch==' constraints.txt)"
RUN --mount=type=bind,from=wheels,target=/wheels \
    if ls /wheels/*.whl > /dev/null 2>&1; then set -- --no-index --find-links /wheels; else set --; fi \
 && /opt/tools/bin/pip install "$@" hatchling \
 && python3 requirements.py > requirements.txt \
 && /opt/fedtune/bin/pip install -c constraints.txt "$@" -r requirements.txt

# headers and other packages' tests: 250 MB that nothing here reads
FROM packages AS slim
RUN set -- /opt/fedtune/lib/python3*/site-packages \
 && rm -rf "$1/torch/include" "$1/pyarrow/include" "$1/pyarrow/src" "$1/pyarrow/tests" "$1/pandas/tests" \
 && find "$1/scipy" "$1/sklearn" "$1/sympy" "$1/networkx" "$1/numba" -type d -name tests -prune -exec rm -rf {} +

# --- fedtune as a wheel --------------------------------------------------------------------------------------------------
FROM packages AS wheel
COPY README.md LICENSE /src/
COPY fedtune /src/fedtune
RUN /opt/tools/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /dist .

# --- what runs: no compiler, nobody's home, a root that may be read-only ----------------------------------------------------
FROM ${BASE_IMAGE} AS run
RUN groupadd --system --gid 10001 fedtune \
 && useradd --system --uid 10001 --gid 10001 --home-dir /tmp --shell /usr/sbin/nologin fedtune \
 && install --directory --mode 0700 --owner fedtune --group fedtune /keys /runs /site /model \
    /demo/operator /demo/coordinator /demo/site-a /demo/site-b /demo/site-c
COPY --from=slim /opt/fedtune /opt/fedtune
ENV PATH=/opt/fedtune/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp NUMBA_CACHE_DIR=/tmp/numba FLWR_TELEMETRY_ENABLED=0
COPY docker /opt/fedtune/docker
# the kernels are compiled here once, for the processor that builds; another one compiles them anew, into /tmp
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist \
    pip install --no-cache-dir --no-deps --no-index /dist/*.whl \
 && NUMBA_CACHE_DIR=/opt/fedtune/numba python -c 'import fedtune.zeroth' \
 && install --mode 0755 /opt/fedtune/docker/start.sh /opt/fedtune/bin/start
USER 10001
WORKDIR /tmp
ENTRYPOINT ["start"]

# volumes of its user: /keys, /runs (server), /keys, /site (client), and what --data names
FROM run AS server
EXPOSE 9443
HEALTHCHECK --interval=15s --timeout=30s --start-period=180s CMD ["python", "-SE", "/opt/fedtune/docker/health.py", "server"]
CMD ["server", "--keys", "/keys", "--runs", "/runs"]

FROM run AS client
HEALTHCHECK --interval=15s --timeout=30s --start-period=180s CMD ["python", "-SE", "/opt/fedtune/docker/health.py", "client"]
CMD ["client", "--server", "server:9443", "--keys", "/keys", "--home", "/site"]
