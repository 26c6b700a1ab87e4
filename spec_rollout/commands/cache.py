"""`spec-rollout cache`: what a store holds; checked, exported, imported, compacted, ended."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spec_rollout.cache.disk import DiskStore
    from spec_rollout.cache.ray_pool import RayStore

HELP = "look after a store of rollouts on disk or in Ray actors"
_RAY = "ray:"  # before the name of a pool; anything else is a folder


def add_options(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, text: str) -> argparse.ArgumentParser:
        added = actions.add_parser(name, help=text, description=text, allow_abbrev=False)
        if name != "import":
            added.add_argument(
                "store", metavar="STORE", help=f"its folder, or {_RAY}NAMESPACE/NAME of the actors"
            )
        return added

    action("info", "how much it holds, and which states of it can be brought back")
    action("verify", "reads everything and compares all checksums; exit status 1 if it is damaged")
    action("export", "writes all rollouts to one cache file").add_argument(
        "file", type=Path, metavar="FILE"
    )
    imported = action("import", "puts the rollouts of a cache file into a store")
    imported.add_argument("file", type=Path, metavar="FILE")
    imported.add_argument(
        "store", metavar="STORE", help=f"folder, made if there is none, or {_RAY}NAMESPACE/NAME"
    )
    imported.add_argument("--replace", action="store_true", help="instead of what it holds")
    action("compact", "gives room that is not used back to the disk; no process may have it open")
    action("stop", f"ends the actors of {_RAY}NAMESPACE/NAME; what they have on disk stays")


def run(args: argparse.Namespace) -> int:
    actions = {
        "info": _info,
        "verify": _verify,
        "export": _export,
        "import": _import,
        "compact": _compact,
        "stop": _stop,
    }
    return actions[args.action](args)


def _pool_name(args: argparse.Namespace) -> str | None:
    """Of Ray actors; None if the store is a folder."""
    store: str = args.store
    return store.removeprefix(_RAY) if store.startswith(_RAY) else None


@contextmanager
def _opened(args: argparse.Namespace, *, create: bool = False) -> Iterator[DiskStore | RayStore]:
    name = _pool_name(args)
    if name is not None:
        from spec_rollout.cache.ray_pool import RayStore

        yield RayStore(name, create=create)
        return
    from spec_rollout.cache.disk import DiskStore

    with DiskStore(args.store, create=create) as store:
        yield store


def _info(args: argparse.Namespace) -> int:
    from spec_rollout.cache.disk import DiskStore

    with _opened(args) as store:
        size = store.size()
        identity = f" ({store.identity})" if isinstance(store, DiskStore) else ""
        print(f"store      {args.store}{identity}")
        print(f"prompts    {size.num_groups}")
        print(f"rollouts   {size.num_samples}")
        print(f"bytes      {size.num_bytes} as a bound counts them")
        if isinstance(store, DiskStore):
            print(f"on disk    {store.file_bytes()}")
            print(f"marks      {', '.join(map(str, store.marks())) or 'none'}")
        else:
            for place in store.places():
                where = "in memory" if place.folder is None else f"in {place.folder}"
                print(
                    f"actor      {place.actor} on node {place.node}, process {place.pid}, {where}"
                )
    return 0


def _verify(args: argparse.Namespace) -> int:
    from spec_rollout.cache.entry import is_sound

    with _opened(args) as store:  # which checks the pages, if no process has it open already
        num_sound = num_wrong = 0
        for key, samples in store.iterate():
            for sample_id, entry in samples.items():
                if is_sound(key, sample_id, entry):
                    num_sound += 1
                else:
                    num_wrong += 1
                    print(f"wrong checksum: prompt key {key.hex():.64}, sample {sample_id}")
        num_lost = store.size().num_samples - num_sound - num_wrong
    if num_lost > 0:
        print(f"in damaged records: {num_lost} rollouts")
    print(f"{num_sound} rollouts are sound, {num_wrong + max(0, num_lost)} are not")
    return 1 if num_wrong or num_lost > 0 else 0


def _export(args: argparse.Namespace) -> int:
    from spec_rollout.cache import RolloutCache

    with _opened(args) as store:
        cache = RolloutCache(store=store)
        cache.save(args.file)
        if cache.stats.corrupt:
            print(f"note: {cache.stats.corrupt} damaged rollouts were left out", file=sys.stderr)
    return 0


def _import(args: argparse.Namespace) -> int:
    from spec_rollout.cache import RolloutCache
    from spec_rollout.cache.file import read

    groups = read(args.file).groups  # before a store is made for it
    with _opened(args, create=True) as store:
        held = store.size().num_samples
        if held and not args.replace:
            raise ValueError(
                f"{args.store}: expected an empty store (or --replace), got one of {held} rollouts"
            )
        store.replace_all(groups.items())
        print(f"{RolloutCache(store=store).stats.num_samples} rollouts")
    return 0


def _compact(args: argparse.Namespace) -> int:
    from spec_rollout.cache.disk_env import compact

    if _pool_name(args) is not None:
        raise ValueError(f"STORE: expected the folder of a store on disk, got {args.store!r}")
    before, after = compact(args.store)
    print(f"{before} bytes before, {after} after")
    return 0


def _stop(args: argparse.Namespace) -> int:
    from spec_rollout.cache.ray_pool import stop_pool

    name = _pool_name(args)
    if name is None:
        raise ValueError(f"STORE: expected {_RAY}NAMESPACE/NAME, got {args.store!r}")
    print(f"{stop_pool(name)} actors ended")
    return 0
