"""Who samples, at scale: vLLM (https://vllm.ai). Importing this package does not import vLLM."""
