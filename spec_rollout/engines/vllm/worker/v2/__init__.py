"""What lives in vLLM's worker on Model Runner V2: drafts on the device, and how they are tested.

V2 draws with keyed noise of its own (a request's seed, the position, the token), so nothing here
draws: a draft token passes if it is what vLLM's own sampler gives in its row, and under `Lenient`
by that rule's test. Nothing of that waits for the device.

- `table`: the drafts of the requests, by slot of vLLM's request state.
- `kernels`: what is proposed, and how much of it passed.
- `rules`: rows of `Lenient`, and the bonus of `Coupled`.
- `plan`: how much of a draft an asynchronous scheduler plans.
- `proposals`: from history, which the host keeps; `lagged`: made a step late, without waiting;
  `step`: what a step gave the host, and is given by it.
"""
