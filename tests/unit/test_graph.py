"""What a layer needs of a graph of llama.cpp's: also what was written into a cache, or in place."""

import pytest

from mobie_export.runtime.graph import Node, Nodes


def graph(*nodes: tuple[str, str, list, object]) -> Nodes:
    """Of (name, operation, sources, whose memory it writes to, None for its own), sources by name."""
    numbers = {name: i for i, (name, *_) in enumerate(nodes)}
    made = []
    for name, op, sources, root in nodes:
        found = tuple(numbers.get(s, s) for s in sources)
        made.append(Node(name, 1, op, found, numbers[name] if root is None else numbers.get(root, root)))
    return Nodes(made)


@pytest.fixture
def attention() -> Nodes:
    return graph(
        ("embd", "GET_ROWS", ["token_embd.weight", "inp_tokens"], None),
        ("mask", "CAST", ["inp_mask"], None),
        ("k", "MUL_MAT", ["blk.0.attn_k.weight", "embd"], None),
        ("to cache", "SET_ROWS", ["k", "cache_k_l0"], "cache_k_l0"),
        ("of cache", "VIEW", ["cache_k_l0"], "cache_k_l0"),
        ("scores", "MUL_MAT", ["of cache", "embd"], None),
        ("masked", "ADD", ["scores", "mask"], None),
        ("shifted", "SET_ROWS", ["masked", "cache_k_l0"], "cache_k_l0"),
        ("l_out-0", "ADD", ["masked", "embd"], None),
        ("k1", "MUL_MAT", ["blk.1.attn_k.weight", "l_out-0"], None),
        ("scaled", "SCALE", ["k1"], "k1"),
        ("l_out-1", "ADD", ["k1", "mask"], None),
    )


def names(nodes: Nodes, found: set[int]) -> set[str]:
    return {nodes.every[i].name for i in found}


def test_what_was_written_to_a_cache_before_it_is_read_is_needed(attention):
    found, others = attention.needed({attention.find("l_out-0")}, {attention.find("embd")})
    assert names(attention, found) == {"l_out-0", "masked", "scores", "mask", "of cache", "to cache", "k"}
    assert others == {"inp_mask", "cache_k_l0", "blk.0.attn_k.weight"}, "no tokens"


def test_layers_before_are_not_needed(attention):
    found, others = attention.needed({attention.find("l_out-1")}, {attention.find("l_out-0")})
    assert names(attention, found) == {"l_out-1", "k1", "scaled", "mask"}
    assert "inp_tokens" not in others


def test_without_a_start_everything_before_is(attention):
    found, others = attention.needed({attention.find("l_out-1")}, set())
    assert names(attention, found) == {node.name for node in attention.every} - {"shifted"}
    assert "inp_tokens" in others
