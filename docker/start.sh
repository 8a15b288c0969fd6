#!/bin/sh
# fedtune, with the kernels that the image compiled where numba may write beside them.
[ -e "$NUMBA_CACHE_DIR" ] || cp -r /opt/fedtune/numba "$NUMBA_CACHE_DIR" 2> /dev/null
exec fedtune "$@"
