"""Processes: the simulator in each of them, and collectives between them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def start(code: str, **environment: str) -> subprocess.Popen[str]:
    """A Python that has nothing but its environment."""
    paths = os.pathsep.join((str(HERE / "site"), str(HERE.parent)))
    wanted = {**os.environ, "PYTHONPATH": paths, "ASCEND_SIM_EVERYWHERE": "1", **environment}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=wanted,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return output


def test_every_process_has_the_simulator() -> None:
    code = """
import subprocess, sys
child = 'import torch, acl; print("sum", (torch.ones(3).npu() + 1).sum().item())'
subprocess.run([sys.executable, '-c', child], check=True)
"""
    assert "sum 6.0" in finish(start(code))


def test_a_module_of_the_callers_choice_comes_next(tmp_path: Path) -> None:
    (tmp_path / "greeting.py").write_text("import ascend_sim; print(ascend_sim.installed())")
    paths = os.pathsep.join((str(HERE / "site"), str(HERE.parent), str(tmp_path)))
    assert "True" in finish(start("pass", PYTHONPATH=paths, ASCEND_SIM_THEN="greeting"))


def test_nothing_is_installed_unasked() -> None:
    code = "import sys; print('torch' in sys.modules)"
    assert finish(start(code, ASCEND_SIM_EVERYWHERE="0")).split()[-1] == "False"


def test_memory_is_copied_through_pyacl() -> None:
    import acl

    host, device = torch.arange(6.0), torch.zeros(6).npu()
    assert acl.rt.memcpy(device.data_ptr(), 24, host.data_ptr(), 24, 1) == 0
    assert torch.equal(device.cpu(), host)
    assert acl.rt.memcpy(device.data_ptr(), 24, host.data_ptr(), 32, 1) != 0  # larger than its room


# ------------------------------------------------------------------------------- collectives
RANK = """
import json, os, sys, traceback
import torch, torch_npu, torch.distributed as dist
import ascend_sim
from ascend_sim import trace
rank, ranks = int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])
torch.npu.set_device(rank)
dist.init_process_group('hccl')
def dev(values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype).npu()
for line in sys.stdin:
    try:
        exec(json.loads(line), dict(globals()))
        torch.npu.synchronize()
        print('done', flush=True)
    except Exception:
        traceback.print_exc()
        print('failed', flush=True)
dist.destroy_process_group()
"""


class Team:
    """Ranks of one process group, with a simulated device each, that run what they are told."""

    def __init__(self, ranks: int, **environment: str) -> None:
        common = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": free_port(),
            "WORLD_SIZE": str(ranks),
            "ASCEND_SIM_DEVICES": str(ranks),
            "GLOO_SOCKET_IFNAME": "lo",
            "HCCL_EXEC_TIMEOUT": "60",
            **environment,
        }
        self.members = [start(RANK, RANK=str(rank), **common) for rank in range(ranks)]

    def run(self, code: str) -> None:
        """On all ranks at once; each asserts for itself."""
        for member in self.members:
            assert member.stdin is not None
            member.stdin.write(json.dumps(code) + "\n")
            member.stdin.flush()
        outcomes = [self._outcome(member) for member in self.members]
        failures = [said for said, outcome in outcomes if outcome != "done"]
        if failures:
            raise AssertionError("\n".join(failures))

    def _outcome(self, member: subprocess.Popen[str]) -> tuple[str, str]:
        said: list[str] = []
        assert member.stdout is not None
        for line in member.stdout:
            if line.strip() in ("done", "failed"):
                return "".join(said), line.strip()
            said.append(line)
        return "".join(said), "ended"

    def part(self) -> None:
        """Ends the ranks; what they said besides is lost."""
        for member in self.members:
            assert member.stdin is not None
            member.stdin.close()
            member.wait(timeout=120)


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


@pytest.fixture(scope="module")
def team() -> Iterator[Team]:
    """Three ranks for all tests that leave them as they were."""
    team = Team(3)
    yield team
    team.part()


@pytest.mark.opposite_modes
def test_collectives(team: Team) -> None:
    team.run("""
total = dev([1.0, rank])
dist.all_reduce(total)
assert total.tolist() == [3, 3], total
for operation, expected in ((dist.ReduceOp.MAX, 2), (dist.ReduceOp.MIN, 0)):
    extreme = dev([rank], torch.int32)
    dist.all_reduce(extreme, operation)
    assert extreme.item() == expected, extreme

whole = torch.empty(ranks, 2).npu()
dist.all_gather_into_tensor(whole, dev([rank, 10.0 * rank]))
assert whole.tolist() == [[0, 0], [1, 10], [2, 20]], whole

part = torch.empty(2).npu()
dist.reduce_scatter_tensor(part, torch.arange(6.0).npu() * (rank + 1))
assert part.tolist() == [12.0 * rank, 12.0 * rank + 6], part

said = dev([rank])
dist.broadcast(said, 1)
assert said.item() == 1
summed = dev([float(rank + 1)])
dist.reduce(summed, 2)
assert rank != 2 or summed.item() == 6
received = dev([0.0])
dist.scatter(received, [dev([7.0 + each]) for each in range(ranks)] if rank == 0 else None, 0)
assert received.item() == 7 + rank
dist.barrier()
names = {each.name for each in trace.collectives()}
assert names >= {'HcclAllReduce', 'HcclAllGather', 'HcclReduceScatter', 'HcclBroadcast'}, names
assert trace.collectives()[0].bytes == 8
""")


@pytest.mark.opposite_modes
def test_messages_between_two_ranks(team: Team) -> None:
    team.run("""
for turn in range(3):
    if rank == 0:
        dist.send(dev([1.0, turn]), 1)
        answer = dev([0], torch.int64)
        dist.recv(answer, 1)
        assert answer.item() == turn * 2
    elif rank == 1:
        question = dev([0.0, 0.0])
        dist.recv(question, 0)
        dist.send((question[1:] * 2).long(), 0)
""")


def test_sums_are_rounded_once_and_equal_on_all_ranks(team: Team) -> None:
    """Against torch on the CPU: bf16 1 + 2**-8 + 2**-8 is 1 when it is rounded twice."""
    team.run("""
torch.manual_seed(0)
for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.int8):
    whole = (torch.randn(ranks, 999) * 40).to(dtype)
    if dtype.is_floating_point:
        whole[:, 0] = torch.tensor([1, 2**-8, 2**-8], dtype=dtype)
    total = whole[rank].npu()
    dist.all_reduce(total)
    expected = whole.sum(0, dtype=torch.float64 if dtype.is_floating_point else dtype).to(dtype)
    assert torch.equal(total.cpu(), expected), dtype
""")


@pytest.mark.opposite_modes
def test_captured_collectives_meet_at_each_replay(team: Team) -> None:
    team.run("""
warm, summed = dev([0.0]), dev([0.0])
dist.all_reduce(warm)  # makes the communicator, which a capture cannot
torch.npu.synchronize()
graph = torch.npu.NPUGraph()
with torch.npu.graph(graph):
    dist.all_reduce(summed)
    summed.mul_(2)
for start in (1.0, 5.0, -2.0):
    summed.fill_(start + rank)
    graph.replay()
    assert summed.item() == 2 * (3 * start + 3), (start, summed)
""")


@pytest.mark.opposite_modes
def test_a_collective_goes_on_while_its_host_waits_elsewhere(team: Team) -> None:
    """Others issue two collectives and then listen to rank 0 on the CPU, which waits for both."""
    team.run("""
import time
dist.all_reduce(dev([0.0]))  # makes the communicator, which hosts wait for
torch.npu.synchronize()
on_host = dist.new_group(backend='gloo')
first, second, told = dev([1.0]), dev([2.0]), torch.zeros(1)
if rank == 0:
    time.sleep(0.3)
dist.all_reduce(first)
dist.all_reduce(second)
if rank == 0:
    told.fill_(second.item())
dist.broadcast(told, 0, group=on_host)
assert told.item() == 6 and first.item() == 3
""")


def test_ranks_that_disagree_are_told() -> None:
    team = Team(2)
    with pytest.raises(AssertionError, match="does another collective than rank"):
        team.run("dist.all_reduce(dev([1.0] * (rank + 1)))")
    team.part()


def test_a_peer_that_never_comes_is_an_error() -> None:
    """Also of the streams that wait for the collective's: nobody goes on with old values."""
    team = Team(2, HCCL_EXEC_TIMEOUT="1")
    rule = "waited for its peers until HCCL_EXEC_TIMEOUT"
    with pytest.raises(AssertionError, match=rule) as failure:
        team.run("""
dist.all_reduce(dev([1.0]))
if rank == 0:
    alone = dev([1.0])
    dist.all_reduce(alone)
    print('went on with', alone.item())
""")
    assert "went on with" not in str(failure.value).replace("print('went on with'", "")
    team.part()


def test_nothing_stays_in_shared_memory(tmp_path: Path) -> None:
    dead = tmp_path / "ascend_sim-999999999-0"  # no process has this number
    dead.mkdir()
    (dead / "joined-0").touch()
    team = Team(2, ASCEND_SIM_SHARED=str(tmp_path))
    team.run("dist.all_reduce(dev([1.0]))")
    assert [each.name for each in tmp_path.iterdir() if each != dead] and not dead.exists()
    team.part()
    assert list(tmp_path.iterdir()) == []


def test_a_process_sees_the_devices_it_is_given() -> None:
    code = "import torch; print(torch.npu.device_count())"
    given = {"ASCEND_SIM_DEVICES": "4", "ASCEND_RT_VISIBLE_DEVICES": "1,3"}
    assert finish(start(code, **given)).split()[-1] == "2"
