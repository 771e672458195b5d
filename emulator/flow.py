"""Control flow of a kernel: basic blocks, dominators, post-dominators and the order in which blocks are run.

Threads that part at a branch meet again at its immediate post-dominator. The machine always runs the first block, in
the order made here, that holds threads. The order puts every block between a branch and its immediate post-dominator
before the latter, so that whoever arrives there early waits for the rest, however the compiler laid the blocks out.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from functools import partial
from typing import Literal

from hotloop.emulator.syntax import Body, Instruction, Register

EXIT = -1


@dataclass(frozen=True)
class End:
    """How a block ends. `targets`: one block for a jump or a barrier, (taken, fall through) for a branch."""

    kind: Literal["jump", "branch", "table", "barrier", "trap"]
    targets: tuple[int, ...]
    instruction: Instruction | None = None
    predicate: int = -1
    negated: bool = False


@dataclass(frozen=True)
class Block:
    instructions: tuple[Instruction, ...]  # without the one that ends the block, unless that is a barrier with operands
    end: End
    size: int  # with it


def is_barrier(instruction: Instruction) -> bool:
    return (
        instruction.opcode in ("bar", "barrier")
        and not instruction.has("warp", "arrive")
        and "cluster" not in instruction.modifiers
    )


def _ends_block(instruction: Instruction) -> bool:
    return instruction.opcode in ("bra", "brx", "ret", "exit", "trap", "brkpt") or is_barrier(instruction)


def blocks_of(body: Body) -> list[Block]:
    """The blocks in textual order, without those that no path reaches."""
    code = body.instructions
    leaders = {0} | {body.labels[t] for i in code for t in i.targets} | {i.index + 1 for i in code if _ends_block(i)}
    starts = sorted(s for s in leaders if s < len(code))
    number = {s: k for k, s in enumerate(starts)}

    def block_at(label: str) -> int:
        return number.get(body.labels[label], EXIT)

    blocks = []
    for k, start in enumerate(starts):
        stop = starts[k + 1] if k + 1 < len(starts) else len(code)
        last = code[stop - 1]
        follow = k + 1 if stop < len(code) else EXIT
        inner = tuple(code[start : stop - 1] if _ends_block(last) else code[start:stop])
        guard = -1 if last.guard is None else last.guard
        if last.opcode in ("bra", "ret", "exit"):
            goal = block_at(last.targets[0]) if last.opcode == "bra" else EXIT
            if last.guard is None:
                end = End("jump", (goal,), last)
            else:
                end = End("branch", (goal, follow), last, guard, last.guard_negated)
        elif last.opcode == "brx":
            selector = last.operands[0]
            if not isinstance(selector, Register) or last.guard is not None:
                raise last.unsupported("a branch table with a guard or a constant index")
            end = End("table", tuple(block_at(t) for t in last.targets), last, selector.index)
        elif last.opcode in ("trap", "brkpt"):
            end = End("trap", (follow,), last, guard, last.guard_negated)
        elif is_barrier(last):
            if last.guard is not None:
                raise last.unsupported("a barrier under a guard")
            end = End("barrier", (follow,), last)
        else:
            end = End("jump", (follow,))
        blocks.append(Block(inner, end, stop - start))
    return _in_order(blocks)


def successors(block: Block) -> tuple[int, ...]:
    if block.end.kind == "trap" and block.end.predicate < 0:
        return ()
    return tuple(dict.fromkeys(block.end.targets))


def _dominators(count: int, root: int, predecessors: list[list[int]], order: list[int]) -> list[int]:
    """Immediate dominators by iteration over the reverse post-order (Cooper, Harvey and Kennedy); -1: unreachable."""
    position = {node: i for i, node in enumerate(order)}
    idom = [-1] * count
    idom[root] = root

    def common(a: int, b: int) -> int:
        while a != b:
            while position[a] > position[b]:
                a = idom[a]
            while position[b] > position[a]:
                b = idom[b]
        return a

    changed = True
    while changed:
        changed = False
        for node in order:
            if node == root:
                continue
            known = [p for p in predecessors[node] if idom[p] >= 0]
            if not known:
                continue
            best = known[0]
            for p in known[1:]:
                best = common(best, p)
            if idom[node] != best:
                idom[node], changed = best, True
    return idom


def _reverse_post_order(root: int, edges: list[list[int]]) -> list[int]:
    seen, post, stack = {root}, [], [(root, iter(edges[root]))]
    while stack:
        node, rest = stack[-1]
        for t in rest:
            if t not in seen:
                seen.add(t)
                stack.append((t, iter(edges[t])))
                break
        else:
            post.append(node)
            stack.pop()
    return post[::-1]


@dataclass(frozen=True)
class Graph:
    """The last node is the end of the kernel, one past its last block."""

    edges: list[list[int]]
    order: list[int]  # reverse post-order from the entry, loop bodies before loop exits
    immediate_post_dominator: list[int]


def graph_of(edges: list[list[int]]) -> Graph:
    """`edges` of blocks 0..n-1 with n standing for the exit; the entry is 0."""
    count = len(edges)
    backward: list[list[int]] = [[] for _ in range(count)]
    for node, targets in enumerate(edges):
        for t in targets:
            backward[t].append(node)
    first = _reverse_post_order(0, edges)
    idom = _dominators(count, 0, backward, first)
    loops = _loop_sets(edges, backward, idom)

    def shared_loops(node: int, target: int) -> int:
        return len(loops[node] & loops[target])

    # Leaving a loop is visited first, hence placed last in reverse post-order.
    ordered = [sorted(targets, key=partial(shared_loops, node)) for node, targets in enumerate(edges)]
    order = _reverse_post_order(0, ordered)
    # Blocks from which no path leads to the exit (endless loops) are given an edge to it, else nothing post-dominates.
    reaching, work = {count - 1}, [count - 1]
    while work:
        for p in backward[work.pop()]:
            if p not in reaching:
                reaching.add(p)
                work.append(p)
    reverse = [list(p) for p in backward]
    forward = [list(t) for t in edges]
    for node in order:
        if node not in reaching:
            reverse[count - 1].append(node)
            forward[node].append(count - 1)
    ipdom = _dominators(count, count - 1, forward, _reverse_post_order(count - 1, reverse))
    return Graph(edges, order, ipdom)


def _loop_sets(edges: list[list[int]], backward: list[list[int]], idom: list[int]) -> list[set[int]]:
    """For each node the headers of the natural loops it lies in."""
    inside: list[set[int]] = [set() for _ in edges]

    def dominates(a: int, b: int) -> bool:
        while b != a and idom[b] != b and b >= 0:
            b = idom[b]
        return a == b

    for tail, targets in enumerate(edges):
        if idom[tail] < 0:
            continue
        for header in targets:
            if dominates(header, tail):
                loop, work = {header}, [tail]
                while work:
                    node = work.pop()
                    if node not in loop:
                        loop.add(node)
                        work.extend(p for p in backward[node] if idom[p] >= 0)
                for node in loop:
                    inside[node].add(header)
    return inside


def reconvergence_order(graph: Graph) -> list[int]:
    """Reachable nodes, each branch's region before the branch's immediate post-dominator."""
    reachable = set(graph.order)
    rank = {node: i for i, node in enumerate(graph.order)}
    before: dict[int, set[int]] = {node: set() for node in reachable}
    for node in reachable:
        if len(graph.edges[node]) < 2:
            continue
        join = graph.immediate_post_dominator[node]
        if join not in reachable:
            continue
        region, work = set(), [t for t in graph.edges[node] if t != join]
        while work:
            x = work.pop()
            if x not in region:
                region.add(x)
                work.extend(t for t in graph.edges[x] if t != join)
        before[join] |= (region | {node}) - {join}
    after: dict[int, set[int]] = {node: set() for node in reachable}
    for join, nodes in before.items():
        for x in nodes:
            after[x].add(join)
    missing = {node: len(before[node]) for node in reachable}
    ready = [(rank[node], node) for node in reachable if not missing[node]]
    heapq.heapify(ready)
    placed: list[int] = []
    done: set[int] = set()
    while len(placed) < len(reachable):
        if not ready:  # irreducible control flow: the regions contradict each other, and reverse post-order decides
            node = min((n for n in reachable if n not in done), key=rank.__getitem__)
        else:
            node = heapq.heappop(ready)[1]
            if node in done:
                continue
        placed.append(node)
        done.add(node)
        for t in after[node]:
            missing[t] -= 1
            if not missing[t] and t not in done:
                heapq.heappush(ready, (rank[t], t))
    return placed


def _in_order(blocks: list[Block]) -> list[Block]:
    last = len(blocks)
    edges = [[last if t == EXIT else t for t in successors(b)] or [last] for b in blocks] + [[]]
    order = [n for n in reconvergence_order(graph_of(edges)) if n != last]
    number = {old: new for new, old in enumerate(order)} | {EXIT: EXIT}

    def renumber(end: End) -> End:
        targets = tuple(number.get(t, EXIT) for t in end.targets)
        return End(end.kind, targets, end.instruction, end.predicate, end.negated)

    return [Block(b.instructions, renumber(b.end), b.size) for b in (blocks[o] for o in order)]


def maybe_undefined(blocks: list[Block]) -> set[int]:
    """Registers that some path reads before it writes them.

    A write under a guard counts: compilers put the same guard, or one that implies it, on the reads.
    """
    known: list[set[int] | None] = [None] * len(blocks)
    known[0] = set()
    found: set[int] = set()
    work = [0]
    steps = [[*b.instructions, *([b.end.instruction] if b.end.instruction else [])] for b in blocks]
    writes = [{r for i in step for r in i.destinations} for step in steps]
    while work:
        k = work.pop()
        now = known[k]
        assert now is not None
        out = now | writes[k]
        for t in blocks[k].end.targets:
            if t == EXIT:
                continue
            old = known[t]
            new = set(out) if old is None else old & out
            if old is None or new != old:
                known[t] = new
                work.append(t)
    for k, step in enumerate(steps):
        entry = known[k]
        if entry is None:
            continue
        defined = set(entry)
        for i in step:
            found |= {r for r in i.sources if r not in defined}
            defined |= set(i.destinations)
    return found
