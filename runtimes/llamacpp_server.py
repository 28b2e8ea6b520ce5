"""A process that serves one GGUF file over HTTP by xllamacpp: `python -m gptoss_quantize.runtimes.llamacpp_server`.

A process of its own, since llama.cpp ends the process it runs in when an assertion fails. It prints its address and
stops when its standard input is closed. Arguments: FILE, context length, threads.
"""

import sys

import xllamacpp


def main() -> None:
    """Serve until standard input ends."""
    path, context, threads = sys.argv[1:]
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = int(context)
    params.n_parallel = 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(threads)
    params.verbosity = -1
    params.warmup = False
    # positions are asked for one after the other, so the cache of earlier ones must stay whole, in float32
    params.swa_full = params.cache_prompt = True
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    sys.stdout.write(server.listening_address + "\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    main()
