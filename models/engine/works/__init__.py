"""The kinds of work: for each what it needs, which numbers it asks a step for, and its answer.

One protocol (answer.py) for the torch, vLLM and echo engines; a new kind of work is a file here, a
line in all_answers.py and a dataclass in `engine.api.request`. May import `engine.api`,
`engine.scheduling` and `engine.decoding`; no torch, no vllm. Read answer.py, rows_answer.py (the
simplest kinds), generate_answer.py, choose_answer.py, then admission.py and readout.py.
"""
