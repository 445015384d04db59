#!/usr/bin/env bash
# Wheels that a bare CUDA image with torch may lack, for a machine without a network.
#
#   bash benchmarks/gpu/pack.sh 3.12 FOLDER      # where there is a network; x86-64 Linux
#   python benchmarks/gpu/run.py --out DIR --packages FOLDER      # there: installs what is missing, into DIR
#   bash FOLDER/install.sh FOLDER TARGET [PYTHON]      # or by hand
#
# The other machine must have torch with its CUDA libraries and triton, and numpy. Left out as too big, and needed by
# what is named alone: scipy, scikit-learn, pandas and pyarrow (recipes, prepared data), matplotlib and pillow
# (pictures; the demo), datasets. DeepSpeed and what it alone needs go to FOLDER/deepspeed: it is built here where no
# wheel is kept, for which PYTHON (default python3) needs setuptools, and left out where that fails.
set -euo pipefail

version=${1:?usage: pack.sh PYTHON_VERSION FOLDER, such as: pack.sh 3.12 packages}
folder=${2:?usage: pack.sh PYTHON_VERSION FOLDER, such as: pack.sh 3.12 packages}
python=${PYTHON:-python3}
limit_mib=48
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
constraints=$here/../../constraints.txt

if ! [[ $version =~ ^3\.[0-9]+$ ]]; then
  echo "pack.sh: PYTHON_VERSION must look like 3.12, not '$version'" >&2
  exit 2
fi

packages=(
  # what scalemlo imports at once
  accelerate psutil safetensors tqdm packaging PyYAML typing_extensions setuptools
  # its models: transformers, peft, and theirs
  transformers peft tokenizers regex huggingface_hub hf-xet filelock fsspec click httpx2 httpcore2 h11 anyio idna certifi
  truststore typer shellingham
  # its command: configurations, tables
  omegaconf pydantic pydantic_core annotated-types typing-inspection rich markdown-it-py mdurl Pygments Jinja2 MarkupSafe
  # the demo's model
  sentencepiece gguf
  # the checks
  pytest iniconfig pluggy cloudpickle
)
of_deepspeed=(hjson msgpack ninja py-cpuinfo einops)

download() { # FOLDER PACKAGE...
  local target=$1
  shift
  "$python" -m pip download --quiet --disable-pip-version-check --only-binary=:all: --no-deps \
    --python-version "$version" --platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64 \
    --dest "$target" -c "$constraints" "$@"
}

mkdir -p "$folder/deepspeed"
download "$folder" "${packages[@]}"
download "$folder/deepspeed" "${of_deepspeed[@]}"
if ! DS_BUILD_OPS=0 "$python" -m pip wheel --quiet --disable-pip-version-check --no-deps \
  -c "$constraints" --wheel-dir "$folder/deepspeed" deepspeed; then
  echo "pack.sh: DeepSpeed could not be built and is left out" >&2
  rm -rf "$folder/deepspeed"
fi
cp "$here/install.sh" "$folder/"

size=$(du -sm "$folder" | cut -f1)
echo "$folder: $(find "$folder" -name '*.whl' | wc -l) wheels for Python $version, $size MiB"
if ((size > limit_mib)); then
  echo "pack.sh: more than $limit_mib MiB" >&2
  exit 1
fi
