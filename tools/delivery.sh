#!/bin/sh
# The way of an engine from a target list to a device, played through on this machine: `make delivery` runs it.
# Two targets are built, signed and pushed to a registry on the loopback interface. A "device", a folder that belongs to
# a user who may write nowhere else, pulls and installs them with an environment that has no torch; then a release that
# gives other tokens than it should, one that was tampered with, and an install that is killed.
# Needs docker-registry (tools/install_test_servers gets it); as root the device is another user (nobody), else the same.
set -eu
PATH=$1:$PATH
amoeba=$1/amoeba
work=$PWD/build/delivery
rm -rf "$work"
mkdir -p "$work"
export AMOEBA_CACHE="$work/cache"
command -v docker-registry > /dev/null || { echo "docker-registry is missing; run tools/install_test_servers" >&2; exit 6; }

show() {
    printf '\n$ %s\n' "$1"
    sh -c "$1" 2>&1 || printf '(exit code %s)\n' "$?"
}
say() { printf '\n# %s\n' "$1"; }

# What stands around the play: an environment for the device, a registry, and the device's folder
say "an environment for the device: no torch, no transformers"
env=${AMOEBA_DEVICE_ENV:-$work/env}
if [ ! -x "$env/bin/amoeba" ]; then
    # The system's interpreter, if it is new enough: the one that builds may lie where another user cannot read.
    base=/usr/bin/python3
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null || base=$1/python
    "$base" -m venv --without-pip "$env"
    "$1/python" -m pip --python "$env/bin/python" install --quiet --disable-pip-version-check "$PWD[device-onnx]" \
        2> "$work/pip.log" || { cat "$work/pip.log" >&2; exit 1; }
fi
"$env/bin/python" - <<'PYTHON'
from importlib.metadata import distributions
from importlib.util import find_spec
print(len({each.name for each in distributions()}), "packages;", *(f"{name}: {'there' if find_spec(name) else 'absent'}" for name in ("torch", "transformers", "onnxruntime")))
PYTHON

port=$("$1/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
registry=127.0.0.1:$port
mkdir "$work/registry"
cat > "$work/registry.yml" <<YAML
version: 0.1
log: {level: error, accesslog: {disabled: true}}
storage: {filesystem: {rootdirectory: $work/registry}}
http: {addr: "$registry"}
YAML
docker-registry serve "$work/registry.yml" > "$work/registry.log" 2>&1 &
server=$!
trap 'kill $server 2> /dev/null || true' EXIT INT TERM
until "$1/python" -c "import socket; socket.create_connection(('127.0.0.1', $port), 1)" 2> /dev/null; do sleep 0.1; done

device=$work/device
mkdir -p "$device/trust"
as_device="env -u AMOEBA_CACHE HOME=/nonexistent"
nobody="setpriv --reuid 65534 --regid 65534 --clear-groups"
if [ "$(id -u)" = 0 ] && $nobody env "$env/bin/python" -c ''; then
    chown -R 65534:65534 "$device"
    as_device="$nobody $as_device"
else
    echo "(not root: the device is the same user)"
fi
touch "$work/began"

cd "$work"
ln -s "$amoeba" amoeba-builder
cat > amoeba-device <<SH
#!/bin/sh
exec $as_device "$env/bin/amoeba" "\$@"
SH
chmod +x amoeba-device
PATH=$work:$PATH

say "the builder: two targets, a key"
cat > amoeba.toml <<TOML
[defaults]
device = "raspberry-pi-5"
flow = ["onnx"]
precision = ["int8"]
private-key = "key.pem"

[targets.kiosk]
latency = "20ms"
shape = "12x0.75"
registry = "$registry/acme/kiosk:stable"

[targets.shelf]
latency = "20ms"
shape = "6x0.5"
registry = "$registry/acme/shelf:stable"
TOML
show 'cat amoeba.toml'
show 'openssl ecparam -name prime256v1 -genkey -noout -out key.pem && openssl ec -in key.pem -pubout -out key.pub'
show 'amoeba-builder build --sign --serial 1 --push'
show 'amoeba-builder build --sign --push --quiet'

say "the device: trusts the key, installs release 1"
cp key.pub device/trust/
show "amoeba-device bundle install $registry/acme/kiosk:stable --root device --device raspberry-pi-5"
show 'amoeba-device run device/current -p "Question: What is the job of Faiven? Answer:" --tokens 2'

say "release 2: another shape. What both share is in the registry already; the device polls the tag"
sed -i 's/"12x0.75"/"10x0.75"/' amoeba.toml
show 'amoeba-builder build --target kiosk --sign --serial 2 --push'
show "amoeba-device bundle install $registry/acme/kiosk:stable --root device"
show "amoeba-device bundle install $registry/acme/kiosk:stable --root device"

say "an engine for another target, an older release, another key: refused"
sed 's/raspberry-pi-5/orin-nx/; s/private-key.*/private-key = "key.pem"/' amoeba.toml > other.toml
show 'amoeba-builder build --config other.toml --target shelf --sign --serial 9 --quiet'
show 'amoeba-device bundle install dist/shelf --root device'
sed -i 's/"10x0.75"/"12x0.75"/' amoeba.toml
show 'amoeba-builder build --target kiosk --sign --serial 1 --quiet'
show 'amoeba-device bundle install dist/kiosk --root device'
show 'openssl ecparam -name prime256v1 -genkey -noout -out stranger.pem'
show 'amoeba-builder bundle sign dist/kiosk --private-key stranger.pem --serial 3'
show 'amoeba-device bundle install dist/kiosk --root device'

say "release 3, tampered with on its way: one byte of the weights"
show 'amoeba-builder bundle sign dist/kiosk --private-key key.pem --serial 3'
cp -r dist/kiosk tampered
"$1/python" - <<'PYTHON'
with open("tampered/engine/weights.int8.safetensors", "r+b") as file:
    file.seek(500_000)
    byte = file.read(1)
    file.seek(500_000)
    file.write(bytes([byte[0] ^ 1]))
PYTHON
show 'amoeba-device bundle install tampered --root device'

say "release 4, broken where it was built: other weights, but listed and signed as they should be"
cp -r dist/kiosk broken
"$1/python" - <<'PYTHON'
from pathlib import Path

from amoeba_deploy.bundle import read_manifest, write_manifest

bundle = Path("broken")
file = bundle / "engine" / "weights.int8.safetensors"
data = bytearray(file.read_bytes())
data[len(data) // 2 :] = data[len(data) // 2 :][::-1]
file.write_bytes(data)
facts = read_manifest(bundle)
write_manifest(bundle, {name: value for name, value in facts.items() if name not in ("format", "files")})
PYTHON
show 'amoeba-builder bundle sign broken --private-key key.pem --serial 4'
show "amoeba-builder bundle push broken $registry/acme/kiosk:stable"
show "amoeba-device bundle install $registry/acme/kiosk:stable --root device"
show 'amoeba-device bundle status --root device'
show 'amoeba-device run device/current -p "Question: What is the job of Faiven? Answer:" --tokens 2'

say "release 5, killed between the switch and its confirmation: what ran runs again, and the next try installs it"
show 'amoeba-builder build --target shelf --sign --serial 5 --push --force --quiet'
printf '\n$ amoeba-device bundle install %s/acme/shelf:stable --root device    # kill -9 when it has switched\n' "$registry"
setsid sh -c "exec ./amoeba-device bundle install $registry/acme/shelf:stable --root device" > /dev/null 2>&1 &
killed=$!
until grep -q '"pending": "' device/state.json; do sleep 0.01; done
sleep 0.05
kill -9 "-$killed" 2> /dev/null || kill -9 "$killed" 2> /dev/null || true
wait "$killed" 2> /dev/null || true
show 'amoeba-device bundle status --root device --recover'
show 'amoeba-device run device/current -p "Question: What is the job of Faiven? Answer:" --tokens 2'
show "amoeba-device bundle install $registry/acme/shelf:stable --root device"

say "and back by hand"
show 'amoeba-device bundle rollback --root device'
show 'amoeba-device bundle status --root device'

say "what the device's user wrote outside of its folder since the play began"
if [ "$(id -u)" = 0 ]; then
    find / -xdev -user 65534 -newer "$work/began" -not -path "$device*" -not -path '/proc/*' -print 2> /dev/null | sed 's/^/wrote: /'
    echo "(nothing more)"
fi
