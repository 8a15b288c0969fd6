#!/bin/sh
# The members' keys of the demo, made at the first start, each into a volume of its own: /demo/NAME. The authority stays in /demo/operator.
set -eu
all=/demo/operator/keys
[ -d "$all/authority" ] || fedtune keys init --federation demo --host server --host localhost --keys "$all"
for site in site-a site-b site-c; do
  [ -e "/demo/$site/.complete" ] && continue
  # a start that was cut short may have made keys that nobody got
  fedtune keys issue "$site" --keys "$all" 2> /dev/null || fedtune keys renew "$site" --keys "$all"
  cp -a "$all/clients/$site/." "/demo/$site/" && rm -r "$all/clients/$site" && touch "/demo/$site/.complete"
done
# last, with the whole allow list; never again, because it is the coordinator that revokes
if [ ! -e /demo/coordinator/.complete ]; then
  cp -a "$all/coordinator/." /demo/coordinator/ && touch /demo/coordinator/.complete
fi
fedtune keys list --keys /demo/coordinator
