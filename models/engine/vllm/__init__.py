"""vLLM behind the engine seam. Can be taken away; the only folder that imports vllm.

May import all other rooms of the engine. Read vllm_engine.py, vllm_core.py, vllm_requests.py;
vllm_limits.py is what must be known of vLLM before it is imported.
"""
