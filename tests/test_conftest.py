"""The rules of tests/conftest.py hold."""

import socket

import pytest
import torch


@pytest.mark.parametrize("method", ["connect", "connect_ex"])
def test_other_machines_are_out_of_reach(method):
    with socket.socket() as plug, pytest.raises(RuntimeError, match="this machine only"):
        getattr(plug, method)(("192.0.2.1", 80))  # an address that RFC 5737 keeps for documents


def test_this_machine_is_in_reach():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as plug:
        assert plug.getpeername() == server.getsockname()


def test_seeds_are_fixed():
    drawn = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(3))
    assert torch.get_num_threads() == 1
