"""The compiled operators called directly, without the checks of `tca_fast.ops` in front of them."""

import pytest
import torch
from operator_cases import weights

T, D, F, C = 3, 2, 5, 4


@pytest.fixture
def arguments():
    """A valid value for every argument of every operator, by name."""
    x, mlp_out, W_enc, b_enc, W_dec, b_dec = weights(T, D, F, grad=False)
    return {
        **{"x": x, "mlp_out": mlp_out, "W_enc": W_enc, "b_enc": b_enc},
        **{"W_dec": W_dec, "b_dec": b_dec, "gain": torch.ones(F).double()},
        "token_mask": torch.tensor([True, False, True]),
        "k": 2,
        "capacity": C,
        "row_ptr": torch.tensor([0, 1, 1, 3]),
        "feature": torch.tensor([4, 0, 2, 0], dtype=torch.int32),
        "value": torch.ones(C).double(),
        "grad_value": torch.ones(C).double(),
        "grad_y": torch.ones(T, D).double(),
        "grad_l1": torch.ones(()).double(),
    }


OPERATORS = ["encode", "encode_backward", "decode", "decode_backward", "adapter"]
OPERATORS += ["adapter_backward"]


def names(operator):
    """Arguments of an operator, in order."""
    function = getattr(torch.ops.tca_fast, operator).default
    return [argument.name for argument in function._schema.arguments]


def call(operator, arguments):
    function = getattr(torch.ops.tca_fast, operator).default
    return function(*[arguments[name] for name in names(operator)])


@pytest.mark.parametrize("operator", OPERATORS)
def test_valid_arguments_pass(operator, arguments):
    call(operator, arguments)


# The arguments that T, F, the room and the dtype are read from: others are blamed for their faults.
LEADING = {"x", "W_enc", "W_dec", "value", "feature", "row_ptr"}
# Nothing else in these calls has as many rows, so any number is right.
FREE = {("encode", "x"), ("encode_backward", "W_enc"), ("decode", "row_ptr")}
ANY_DIMENSIONS = {("adapter", "mlp_out")}  # as long as the rows are right
MISFITS = [
    (operator, name, wrong)
    for operator in OPERATORS
    for name in names(operator)
    if name not in ("k", "capacity")
    for wrong in ("dimensions", "rows", "dtype")
    if (operator, name) not in {"rows": FREE, "dimensions": ANY_DIMENSIONS}.get(wrong, ())
]


@pytest.mark.parametrize(("operator", "name", "wrong"), MISFITS)
def test_a_tensor_that_does_not_fit_is_named(operator, name, wrong, arguments):
    right = arguments[name]
    if wrong == "dtype":
        arguments[name] = right.to(torch.float16 if right.dtype == torch.float64 else torch.float64)
    elif wrong == "dimensions":
        arguments[name] = right.unsqueeze(0).unsqueeze(0)
    else:
        arguments[name] = right.new_zeros(
            right.shape[0] + 1 if right.dim() else 2, *right.shape[1:]
        )
    named = r"\w+" if name in LEADING else name
    with pytest.raises(RuntimeError, match=rf"\b{named}: (shape|dtype) .*, expected "):
        call(operator, arguments)


@pytest.mark.parametrize(
    ("operator", "change", "message"),
    [
        ("encode", {"k": 0}, r"k: 0, expected 1\.\.5"),
        ("encode", {"k": -3}, r"k: -3, expected 1\.\.5"),
        ("adapter", {"k": 6}, r"k: 6, expected 1\.\.5"),
        ("adapter_backward", {"k": 6}, r"k: 6, expected 1\.\.5"),
        ("encode", {"capacity": -1}, "capacity: -1, expected 0 or more"),
        ("adapter", {"capacity": -1}, "capacity: -1, expected 0 or more"),
    ],
)
def test_a_number_out_of_range_is_named(operator, change, message, arguments):
    with pytest.raises(RuntimeError, match=message):
        call(operator, {**arguments, **change})


@pytest.mark.parametrize(
    "operator", ["encode_backward", "decode", "decode_backward", "adapter_backward"]
)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row_ptr": [0, 2, 1, 3]}, "row_ptr: falls from 2 to 1 at token 1; it must not fall"),
        ({"row_ptr": [1, 1, 2, 3]}, "row_ptr: starts at 1, expected 0"),
        ({"row_ptr": [0, 1, 1, -1]}, "row_ptr: falls from 1 to -1 at token 2"),
        ({"feature": [4, 0, 5, 0]}, r"feature: entry 2 is 5, expected 0\.\.4"),
        ({"feature": [-1, 0, 2, 0]}, r"feature: entry 0 is -1, expected 0\.\.4"),
    ],
)
def test_packed_features_made_by_hand_are_checked(operator, change, message, arguments):
    for name, entries in change.items():
        arguments[name] = torch.tensor(entries, dtype=arguments[name].dtype)
    with pytest.raises(RuntimeError, match=message):
        call(operator, arguments)


@pytest.mark.parametrize("operator", ["encode_backward", "decode", "decode_backward"])
def test_more_entries_than_there_is_room_for_are_refused(operator, arguments):
    arguments["row_ptr"] = torch.tensor([0, 1, 1, 9])
    with pytest.raises(RuntimeError, match="row_ptr: 9 active features do not fit the capacity"):
        call(operator, arguments)


def test_counts_that_contradict_kept_activations_harm_nothing(arguments):
    """All T·F activations are kept: those are what counts, whatever `row_ptr` says."""
    features = torch.zeros(T, F).double()
    features[0, 1] = features[2, 4] = 1.5
    kept = {"feature": torch.empty(0, dtype=torch.int32), "value": features.flatten(), "k": None}
    told = [
        call("adapter_backward", {**arguments, **kept, "row_ptr": torch.tensor(row_ptr)})
        for row_ptr in ([0, 1, 1, 2], [0, 0, 0, 0], [0, 5, 9, 15])
    ]
    for wrong in told[1:]:
        for a, b in zip(told[0], wrong, strict=True):
            torch.testing.assert_close(a, b)


def test_a_token_alone_has_the_bits_it_has_among_many():
    """A few tokens are decoded by another kernel than many, and must not show it."""
    num_tokens, width, num_features = 40, 700, 400
    _, mlp_out, _, b_enc, W_dec, b_dec = weights(
        num_tokens, width, num_features, dtype=torch.float32, grad=False
    )
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-3, 4, (num_tokens, width), generator=generator).float()
    W_enc = torch.randint(-3, 4, (num_features, width), generator=generator).float()
    adapter = torch.ops.tca_fast.adapter
    for token in range(num_tokens):
        alone = torch.arange(num_tokens) == token
        # Products of small integers are exact in any order. Few features fire, so none are dense.
        weak = b_enc - 2.2 * 4 * width**0.5
        among = adapter(x, mlp_out, W_enc, weak, W_dec, b_dec, None, alone, None, 0)
        own = adapter(*(x[alone], mlp_out[alone], W_enc, weak, W_dec, b_dec, None, None, None, 0))
        assert torch.equal(among[0][alone], own[0])
        for ours, theirs in zip(own[1:4:2], among[1:4:2], strict=True):
            assert torch.equal(ours, theirs)
        assert own[2].item() == among[2][token].item() < num_features / 16
