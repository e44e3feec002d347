#!/usr/bin/env bash
# make.sh FOLDER [PYTHON]: an environment with PyTorch for CUDA 13 in FOLDER (3 GB), and device.cpp as its libcuda.
# FOLDER/python then starts Python on the null device.
set -euo pipefail
here=$(dirname "$(realpath "$0")")
mkdir -p "$1"
out=$(realpath "$1")
python=${2:-python3.12}
root=$here/../..
fixed=(torch==2.11.0 transformers==5.17.0 megatron-core==0.19.2)

if [ ! -e "$out/venv/.ready" ]; then
  "$python" -m venv "$out/venv"
  "$out/venv/bin/pip" install --quiet "${fixed[@]}"
  "$out/venv/bin/python" "$root/docker/selfcheck.py" --requirements "$root/pyproject.toml" >"$out/requirements.txt"
  "$out/venv/bin/pip" install --quiet "${fixed[@]}" --requirement "$out/requirements.txt"
  touch "$out/venv/.ready"
fi
cd "$out"
site=$(venv/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
headers=(-I"$site/nvidia/cu13/include" -I"$site/triton/backends/nvidia/include")
compile=(g++ -std=c++17 -shared -fPIC -O1 "${headers[@]}" "$here/device.cpp")

# What PyTorch takes from CUDA, and what Triton and its allocator look up by name while they run.
wanted() {
  for library in "$site"/torch/lib/*.so; do nm -D --undefined-only "$library"; done 2>/dev/null |
    awk '{sub("@.*", "", $2); print $2}' | grep -E '^(__cuda|cuda[A-Z]|cublas|cu[A-Z]|nccl)'
  printf '%s\n' cuInit cuLaunchKernelEx cuCtxPushCurrent_v2 cuCtxPopCurrent_v2 cuCtxGetDevice cuCtxSetLimit \
    cuCtxGetLimit cuFuncSetAttribute cuFuncSetCacheConfig cuDeviceGetName cuOccupancyMaxActiveClusters cuModuleUnload \
    cuDriverGetVersion cuStreamSynchronize cuMemcpyDtoHAsync_v2 cuTensorMapEncodeTiled cuMemMap cuMemUnmap \
    cuMemSetAccess
}
"${compile[@]}" -o defined.so
comm -23 <(wanted | sort -u) <(nm -D defined.so | awk '$2 == "T" {print $3}' | sort -u) |
  sed 's/.*/int &(){return 0;}/' >rest.c
gcc -c -fPIC -w rest.c -o rest.o
"${compile[@]}" rest.o -Wl,-soname,libcuda.so.1 -o libcuda.so.1 -ldl
ln -sf libcuda.so.1 libcuda.so
rm -f defined.so rest.c rest.o

cat >python <<END
#!/usr/bin/env bash
export LD_PRELOAD=$out/libcuda.so.1 LD_LIBRARY_PATH=$out TRITON_LIBCUDA_PATH=$out TRITON_CACHE_DIR=$out/triton
export TORCHINDUCTOR_CACHE_DIR=$out/inductor TORCHINDUCTOR_COMPILE_THREADS=1 SPOT_MEGATRON_NULL_CUDA=1
exec $out/venv/bin/python "\$@"
END
chmod +x python
