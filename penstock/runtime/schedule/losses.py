"""What goes with a step that died: KV that it and others were to write, and who was to read that."""

from __future__ import annotations

from collections.abc import Iterable

from penstock.runtime.kv.blocks import BlockRef
from penstock.runtime.kv.manager import KvManager
from penstock.runtime.schedule.batch import StepPlan
from penstock.runtime.schedule.request import Request


def withdraw(plan: StepPlan, later: Iterable[StepPlan], kv: KvManager) -> dict[Request, None]:
    """Nobody finds any more what this step, or a later one that builds on it, was to write to blocks of the pool or of
    the host. Returns whose requests have come to nothing, in order."""
    doomed = dict.fromkeys((*plan.requests, *(fork.request for fork in plan.retabled)))
    bad, hosts = set(plan.published), {host_block for _, host_block in plan.saved}
    kv.withdraw(plan.published)
    for step in later:
        hosts = _hosts(step, bad, hosts)
        spoiled = {block for host_block, block in step.restored if host_block in hosts}
        lost = {ref for ref in step.published if ref.block in spoiled}
        readers = [each for each in step.admitted if (bad | lost).intersection(kv.refs(each.slot))]
        doomed |= dict.fromkeys(reader.request for reader in readers)
        refs = {ref for request in doomed if request.slot is not None for ref in kv.refs(request.slot)}
        lost |= refs.intersection(step.published)
        kv.withdraw(lost)
        bad |= lost
    kv.host.withdraw(hosts)
    return doomed


def _hosts(step: StepPlan, bad: set[BlockRef], hosts: set[int]) -> set[int]:
    """Blocks of the host that do not hold what they should, once the step's copies to them are made."""
    blocks = {ref.block for ref in bad}
    return {h for block, h in step.saved if block in blocks} | hosts - {h for _, h in step.saved}
