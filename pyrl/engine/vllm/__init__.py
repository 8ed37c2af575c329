"""vLLM (https://vllm.ai) as an engine. Importing this package does not import vLLM."""
