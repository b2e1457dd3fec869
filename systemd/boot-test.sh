#!/bin/bash
# Boots foldd.service and foldd-runtime.service on a real systemd, in a container, and proves what they promise.
#
#   systemd/boot-test.sh [--fresh] [--keep] [--json FILE]          (as root; `make boot-test`)
#
# --fresh  make the system tree and the wheels anew, not from the cache
# --keep   leave the tree behind, and say where
# --json   write the findings there too
#
# SUITE    the Debian release in the tree; it must have the Python release of $PYTHON (default: chosen by that)
# PYTHON   collects the wheels, with pip's own configuration (default: python3.11 or python3)
# CACHE    ${XDG_CACHE_HOME:-~/.cache}/foldd-boot-test
#
# Needs: apt-get install systemd-container mmdebstrap. The first run takes some minutes (it makes a Debian tree and
# collects the wheels), later ones about five. Nothing of the machine is changed but the cache.
set -euo pipefail

die() { echo "boot-test: $*" >&2; exit 2; }
say() { printf '%4ss  %s\n' "$SECONDS" "$*"; }

root=$(cd "$(dirname "$0")/.." && pwd)
fresh='' keep='' json=''
while [ $# -gt 0 ]; do
  case $1 in
    --fresh) fresh=yes ;;
    --keep) keep=yes ;;
    --json) json=$(realpath -m "${2:?--json needs a file}"); shift ;;
    *) die "unknown argument $1; see the top of this file" ;;
  esac
  shift
done
[ "$(id -u)" = 0 ] || die 'run it as root: a system container needs that'
for tool in systemd-nspawn mmdebstrap; do
  command -v "$tool" > /dev/null || die "there is no $tool; apt-get install systemd-container mmdebstrap"
done

python=${PYTHON:-$(command -v python3.11 || command -v python3)} || die 'there is no Python'
release=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
case $release in
  3.11) suite=${SUITE:-bookworm} ;;
  3.13) suite=${SUITE:-trixie} ;;
  *) suite=${SUITE:-} ;;
esac
[ -n "$suite" ] || die "no Debian release is known to have Python $release; set SUITE, or PYTHON to a 3.11"

cache=${CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/foldd-boot-test}
mkdir -p "$cache"
exec 9> "$cache/lock"
flock -n 9 || die "another boot test is using $cache"
work=$(mktemp -d "${TMPDIR:-/var/tmp}/foldd-boot-test.XXXXXX")
container=
finish() {
  status=$?
  if [ -n "$container" ] && kill -0 "$container" 2> /dev/null; then kill -TERM "$container"; wait "$container" || true; fi
  if [ -n "$keep" ]; then echo "left behind: $work"; else rm -rf --one-file-system "$work"; fi
  exit "$status"
}
trap finish EXIT
trap 'exit 130' INT TERM
mkdir "$work/source" "$work/tree" "$work/results"

# A copy of the source, so that what is built here is not changed under our hands, and nothing is built in it.
tar -C "$root" --exclude='./.?*' --exclude=./build --exclude=./dist --exclude=./demo-state --exclude=./out \
  --exclude='*.egg-info' --exclude=__pycache__ -cf - . | tar -C "$work/source" -xf -

# --- the two slow things, cached by what they depend on
base="$cache/$suite.tar"
[ -z "$fresh" ] || rm -f "$base"
if [ ! -e "$base" ]; then
  say "making a $suite tree (once)"
  mmdebstrap --quiet --format=tar --variant=minbase --include=systemd,systemd-sysv,dbus,make,procps,python3,python3-venv \
    "$suite" "$base.part" ${MIRROR:+"$MIRROR"}
  mv "$base.part" "$base"
fi

constraints=()
[ ! -e "$root/constraints.txt" ] || constraints=(--constraint "$root/constraints.txt")
key=$({ "$python" -c 'import sys, sysconfig, tomllib
project = tomllib.load(open(sys.argv[1], "rb"))["project"]
print(project["dependencies"], project["optional-dependencies"]["daemon"], sys.version_info[:2], sysconfig.get_platform())' "$root/pyproject.toml"
  [ ! -e "$root/constraints.txt" ] || cat "$root/constraints.txt"; } | sha256sum | cut -c1-16)
wheels="$cache/wheels-$key"
[ -z "$fresh" ] || rm -rf "$wheels"
if [ ! -e "$wheels" ]; then
  say 'collecting wheels (once)'
  rm -rf "$wheels.part"
  (cd "$work/source" && "$python" -m pip wheel --quiet --disable-pip-version-check "${constraints[@]}" \
    --wheel-dir "$wheels.part" '.[daemon]')
  rm -f "$wheels.part"/foldd-*.whl
  mv "$wheels.part" "$wheels"
fi
say "building foldd's wheel"
(cd "$work/source" && "$python" -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$work/wheel" .)
rm -rf "$work/source/build"

# --- the tree
tree="$work/tree"
say "unpacking $suite"
tar -C "$tree" --exclude='./dev/*' -xf "$base"
# Not registered: neither systemd-machined nor a system bus need run here.
offline=/usr/src/wheels # in the tree, which has no network; boot_probe.py knows it too
mkdir -p "$tree$offline/foldd" "$tree$offline/others"
nspawn=(systemd-nspawn --quiet "--directory=$tree" --register=no --keep-unit --private-network
  "--bind-ro=$work/source:/usr/src/foldd" "--bind-ro=$work/wheel:$offline/foldd" "--bind-ro=$wheels:$offline/others")
inside() { # a command in the tree, without booting it
  "${nspawn[@]}" --pipe --setenv=PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$@"
}
say 'make install'
started=$SECONDS
inside make -C /usr/src/foldd -f systemd/install.mk install WHEELS="$offline/*/*.whl" \
  > "$work/install.log" 2>&1 || { tail -40 "$work/install.log"; die 'make install failed'; }
installed=$((SECONDS - started))

say 'foldd init, keys, configuration'
# The folds take a few seconds each, so that they can be cut in the middle.
cat >> "$tree/etc/foldd/config.toml" << 'EOF'
bind = "tcp://127.0.0.1:5757"
announce = "tcp://127.0.0.1:5758"
submitters = "/etc/foldd/submitters"
devices = "/etc/foldd/devices"
[fold.otmf-paper]
steps = 12
EOF
sed -i 's/^#method = .*/method = "otmf-paper"/' "$tree/etc/foldd/config.toml"
cat >> "$tree/etc/foldd/runtime.env" << 'EOF'
FOLDD_RUNTIME_OPTIONS=--from tcp://127.0.0.1:5757 --announcements tcp://127.0.0.1:5758 --identity /etc/foldd/keys/device.key --trust /etc/foldd/keys/daemon.pub
EOF
cat > "$work/setup.sh" << 'EOF'
set -eu
useradd --groups foldd-drop --create-home dropper
/opt/foldd/bin/python /usr/src/foldd/systemd/boot_fixture.py /srv/boot-test 12
runuser -u foldd -- foldd init --base /srv/boot-test/base.pt2 --head head
foldd keygen device --directory /etc/foldd/keys
cp /etc/foldd/keys/device.pub /etc/foldd/devices/
cp /var/lib/foldd/keys/daemon.pub /etc/foldd/keys/
chown foldd-runtime: /etc/foldd/keys/device.key
systemctl enable foldd.service foldd-runtime.service
EOF
inside --bind-ro="$work/setup.sh:/root/setup.sh" sh /root/setup.sh > "$work/setup.log" 2>&1 ||
  { tail -40 "$work/setup.log"; die 'setting up failed'; }
cat > "$tree/etc/systemd/system/boot-test.service" << 'EOF'
[Unit]
Description=Boot test
[Service]
Type=exec
ExecStart=/usr/bin/python3 /usr/src/foldd/systemd/boot_probe.py /srv/boot-test /media/results
EOF
mkdir -p "$tree/etc/systemd/system/multi-user.target.wants"
ln -s ../boot-test.service "$tree/etc/systemd/system/multi-user.target.wants/boot-test.service"

# --- the boot
say 'booting'
timeout --kill-after=20 1800 "${nspawn[@]}" --boot --machine="foldd-boot-$$" \
  --bind="$work/results:/media/results" > "$work/console.log" 2>&1 < /dev/null &
container=$!
touch "$work/results/findings.jsonl"
row='import json, sys
for line in sys.stdin:
    found = json.loads(line)
    value = "" if found["value"] is None else str(found["value"])
    print("{:4} {:48} {:>10}  {}".format("ok" if found["ok"] else "FAIL", found["name"], value, found["note"]), flush=True)'
tail -n +1 -f --pid="$container" "$work/results/findings.jsonl" 2> /dev/null | "$python" -c "$row"
wait "$container" || true
container=

[ -z "$json" ] || { mkdir -p "$(dirname "$json")"; cp "$work/results/findings.jsonl" "$json"; }
verdict=$(cat "$work/results/verdict" 2> /dev/null || echo 'no verdict: the system did not come up')
say "make install took $installed s; $verdict"
if [ "$verdict" != passed ]; then
  [ -s "$work/results/journal.txt" ] && grep -E 'foldd' "$work/results/journal.txt" | tail -60 || tail -40 "$work/console.log"
  exit 1
fi
