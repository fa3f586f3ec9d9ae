#!/bin/sh
# Builds the image on Debian 12, checks it, and runs the smoke pipeline three times: on this machine, in one container,
# and with every step in a container of its own. All three leaderboards must be equal. What it takes: README.md.
set -eu
cd "$(dirname "$0")/../.."

PYTHON=${PYTHON:-$PWD/.venv/bin/python}
WORK=${WORK:-/var/tmp/unlabeled-containers}
IMAGE=${IMAGE:-localhost/unlabeled-python:0.1.0}
BUILD_ARGUMENTS=${BUILD_ARGUMENTS:-}
BASE=localhost/python:3.11-bookworm
HERE=tests/containers
export TMPDIR=/var/tmp OMP_NUM_THREADS=1 PYTHONPATH="$PWD:$WORK/sdk" DOCKER_HOST="unix://$WORK/podman.sock"

say() { printf '\n== %s (%s s)\n' "$1" "$(($(date +%s) - STARTED))"; }
fail() { echo "$1" >&2; exit 1; }
contained() { podman run --rm --read-only --read-only-tmpfs=false --tmpfs /tmp --cap-drop all --shm-size 2g "$@"; }
STARTED=$(date +%s)

say "packages"
PACKAGES="podman buildah runc debootstrap uidmap fuse-overlayfs"
dpkg --status $PACKAGES > /dev/null 2>&1 || apt-get install --yes --no-install-recommends $PACKAGES
rm -rf "$WORK"
mkdir -p "$WORK"
export CONTAINERS_CONF="${CONTAINERS_CONF:-$PWD/$HERE/containers.conf}"
"$PYTHON" -m pip install --quiet --no-deps --target "$WORK/sdk" docker==7.2.0

say "base"
if ! podman image exists "$BASE"; then
    MIRROR=${MIRROR:-$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | head -n 1)}
    debootstrap --variant=minbase --include=python3,python3-pip,python3-venv,ca-certificates bookworm "$WORK/base" "$MIRROR"
    tar --directory "$WORK/base" --create . | podman import - "$BASE"
    rm -rf "$WORK/base"
fi

say "image"
make image ENGINE=podman IMAGE="$IMAGE" BASE="$BASE" BUILD_ARGUMENTS="--isolation chroot $BUILD_ARGUMENTS"
podman image inspect --format '{{.Size}} bytes' "$IMAGE"

say "checks"
DIGEST=$("$PYTHON" -c "from unlabeled.digest import code_digest; print(code_digest())")
LABEL=$(podman image inspect --format '{{index .Labels "unlabeled.code-digest"}}' "$IMAGE")
test "$LABEL" = "$DIGEST" || fail "label: code digest $LABEL, the tree here has $DIGEST"
COMMIT=$(test -n "$(git status --porcelain)" || git rev-parse HEAD)
LABEL=$(podman image inspect --format '{{index .Labels "org.opencontainers.image.revision"}}' "$IMAGE")
test "$LABEL" = "$COMMIT" || fail "label: commit $LABEL, the tree here is that of '$COMMIT'"
test "$(contained "$IMAGE" id -u)" = 1000 || fail "the image runs as another user than 1000"
contained "$IMAGE" sh -c '! touch /app/written /var/tmp/written /home/written 2> /dev/null' || fail "the root can be written"
contained "$IMAGE" > "$WORK/help"
grep -q "served, audited model" "$WORK/help" || fail "no help"
contained "$IMAGE" python -c "import torch; print(torch.compile(lambda x: x + 1)(torch.ones(3)))" || fail "no torch.compile"
grep -q '"name": "torch"' sbom.cdx.json || fail "the bill of materials lacks torch"
# CODE_DIGEST is proven by the build: another one makes no image.
! podman build --isolation chroot $BUILD_ARGUMENTS --build-arg BASE="$BASE" --build-arg CODE_DIGEST=another . > "$WORK/refused" 2>&1
grep -q "CODE_DIGEST is 'another'" "$WORK/refused" || fail "a build of another tree was not refused: $WORK/refused"

say "a container's start and end, three times; then with the imports of a step"
for command in true true true "python -c 'import torch, kfp.dsl'"; do
    before=$(date +%s%N)
    contained "$IMAGE" sh -c "$command"
    echo "$command: $((($(date +%s%N) - before) / 1000000)) ms"
done

say "the pipeline on this machine"
"$PYTHON" -m pipelines.cli run --profile smoke --workspace "$WORK/here" --json > "$WORK/here.json"

say "the pipeline in one container"
mkdir -m 777 "$WORK/one" "$WORK/each"
contained --env OMP_NUM_THREADS --volume "$WORK/one:/workspace" "$IMAGE" \
    unlabeled run --profile smoke --workspace /workspace --json > "$WORK/one.json"

say "the pipeline, each step in a container"
podman system service --time=0 "$DOCKER_HOST" > "$WORK/service" 2>&1 &
trap "kill $!" EXIT
"$PYTHON" $HERE/pipeline.py "$WORK/each" > "$WORK/each.log" 2>&1 || fail "the pipeline failed: $WORK/each.log"
tail -n 1 "$WORK/each.log"
contained --volume "$WORK/each:$WORK/each" "$IMAGE" unlabeled audit --workspace "$WORK/each" | tail -n 3

say "comparison"
"$PYTHON" $HERE/pipeline.py "$WORK/here.json" "$WORK/one.json"
"$PYTHON" $HERE/pipeline.py "$WORK/here.json" "$WORK/each/leaderboard.json"
say "done"
