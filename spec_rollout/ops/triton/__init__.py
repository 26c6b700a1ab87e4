"""`token_logprobs` and `verify_prefix` written in Triton: the second implementation,
`impl="triton"`.

Nothing here is imported until it is asked for, since triton is not a dependency of the package.
`arithmetic` and `rows` are device code, the modules named after ops hold kernel and launcher.
"""
