"""Groups of requests as a suffix index can hold them."""

from __future__ import annotations

import torch

# Rows of one suffix index (csrc/drafting/suffix_index.h), history and live requests together.
MAX_ROWS = 1 << 12


def split_large_groups(
    row_groups: torch.Tensor, request_groups: torch.Tensor, max_rows: int = MAX_ROWS
) -> tuple[torch.Tensor, torch.Tensor]:
    """Divides each group that has too many rows into several, of rows and requests in turn.

    Thousands of samples of one prompt then learn from some thousands of their siblings instead of
    from all.

    Args:
        row_groups: Group of each row of history. [rows], int64, >= 0.
        request_groups: Group of each request. [batch], int64, >= 0.
        max_rows: Most rows and requests of a group together, at least 2.

    Returns:
        The same with new groups after the old ones; as they were where none is too large.
    """
    num_groups = 1 + max(
        (int(g.max()) for g in (row_groups, request_groups) if g.numel()), default=-1
    )
    num_rows = torch.bincount(row_groups, minlength=num_groups)
    num_requests = torch.bincount(request_groups, minlength=num_groups)
    large = (num_rows + num_requests > max_rows).nonzero().flatten().tolist()
    if not large:
        return row_groups, request_groups
    row_groups, request_groups = row_groups.clone(), request_groups.clone()
    for group in large:
        rows, requests = int(num_rows[group]), int(num_requests[group])
        parts = -(-(rows + requests) // max_rows)
        while -(-rows // parts) - (-requests // parts) > max_rows:  # both rounded up
            parts += 1
        for members, count in ((row_groups, rows), (request_groups, requests)):
            part = torch.arange(count) % parts
            members[members == group] = torch.where(part == 0, group, num_groups - 1 + part)
        num_groups += parts - 1
    return row_groups, request_groups
