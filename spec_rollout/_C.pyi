# The compiled extension; its functions take tensors of any library that speaks DLPack, and are
# documented where they are called.
from typing import Any

class MatchShares: ...

def __getattr__(name: str) -> Any: ...
