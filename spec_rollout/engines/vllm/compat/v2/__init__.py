"""The plugin on vLLM's Model Runner V2.

The tokens of a request are those of vLLM's own sampler with the request's seed, in fewer steps: a
draft token passes if it is what that sampler draws in its row.

- `config`: which engines are set up for it, and what they must not have.
- `hooks`: puts speculator, sampler and the rest into a worker's model runner.
- `speculator`: proposes the next tokens of each draft.
- `sampler`: the two samplers, plain and with draft tokens.
- `handler`, `scheduler`: how many draft tokens are planned, synchronously and asynchronously.
- `adapters`: the output head's adapters, where a request has several rows of logits.
- `warm_up`: the profile of memory, and requests that vLLM makes for itself.
- `start`: calls `hooks` in every worker.

Only `config` and `start` are imported where there is no worker.
"""
