# docker build -t spec-rollout . && docker run --gpus all -it --shm-size 16g spec-rollout
#
# vLLM's image has torch, CUDA and vLLM; this adds the package with its CUDA kernels, the trainer and LoRA. ARCH: compute
# capabilities of your GPUs. Not built yet.
ARG VLLM=v0.26.0
FROM vllm/vllm-openai:${VLLM}
ARG ARCH="8.0;9.0;10.0"
RUN apt-get update && apt-get install -y --no-install-recommends g++ git && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/spec_rollout
COPY . .
# torch, transformers and vLLM stay those of the image.
RUN pip freeze | grep -iE '^(torch|transformers|vllm|numpy)==' > /tmp/constraints.txt \
  && SPEC_ROLLOUT_CUDA=ON TORCH_CUDA_ARCH_LIST="${ARCH}" \
     pip install --no-cache-dir -c /tmp/constraints.txt '.[train,parquet]' 'peft>=0.17' \
  && spec-rollout doctor
WORKDIR /workspace
RUN cp -r /opt/spec_rollout/examples .
ENTRYPOINT ["/bin/bash"]
