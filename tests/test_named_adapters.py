"""Several adapters on one model, gains while it generates, and tables of what fired."""

import numpy
import pytest
import torch
from tiny import randomise, tiny_qwen2
from tiny_pair import character_tokenizer

import tca_fast
from tca_fast import sparsity
from tca_fast.errors import UserError

CONFIG = tca_fast.AdapterConfig(num_features=19)
PROMPTS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]])


@pytest.fixture(params=[None, 6], ids=["relu", "topk"])
def adapted(request):
    kind = {} if request.param is None else {"activation": "topk", "k": request.param}
    made = tca_fast.attach(tiny_qwen2(), tca_fast.AdapterConfig(num_features=19, **kind))
    randomise(made)
    return made


def logits(adapted, ids=PROMPTS):
    with torch.no_grad():
        return adapted(ids).logits


def generate(adapted, prompts=PROMPTS, **options):
    return adapted.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=10,
        do_sample=False,
        eos_token_id=None,
        **options,
    )


class TestNames:
    def test_the_active_one_alone_runs_is_trained_and_saved(self, adapted, tmp_path):
        other = tca_fast.attach(tiny_qwen2(), tca_fast.AdapterConfig(num_features=7))
        randomise(other, 5)
        other.save_pretrained(tmp_path / "other")
        first, expected = logits(adapted), logits(other)

        adapted.load("other", tmp_path / "other")
        assert adapted.active == "default" and torch.equal(logits(adapted), first)
        adapted.use("other")
        assert adapted.config.num_features == 7 and torch.equal(logits(adapted), expected)
        features = [p.shape[0] for n, p in adapted.model.named_parameters() if "W_enc" in n]
        assert features == [7] * 3 == [layer.W_enc.shape[0] for layer in adapted.layers]
        adapted.save_pretrained(tmp_path / "again")
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            again, before = (tmp_path / folder / name for folder in ("again", "other"))
            assert again.read_bytes() == before.read_bytes()

        adapted.use("default")
        assert torch.equal(logits(adapted), first)
        adapted.remove("other")
        assert adapted.names == ["default"]

    def test_a_fresh_one_changes_nothing_and_runs_once_a_layer(self, adapted):
        with adapted.disabled():
            bare = logits(adapted)
        adapted.add("fresh", CONFIG, seed=3)
        adapted.use("fresh")
        calls = []
        hooks = [
            module.register_forward_hook(lambda *_: calls.append(1))
            for name in ("default", "fresh")
            for module in adapted._sets[name].layers
        ]
        assert torch.equal(logits(adapted), bare)
        assert len(calls) == 3
        [hook.remove() for hook in hooks]

    def test_detach_takes_them_all_off(self, adapted):
        names = list(tiny_qwen2().state_dict())
        adapted.add("fresh")
        tca_fast.detach(adapted.model)
        assert list(adapted.model.state_dict()) == names

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda a: a.add("default"), "'default' are there already"),
            (lambda a: a.load("default", "x"), "'default' are there already"),
            (lambda a: a.load("new", "nowhere"), "nowhere does not exist"),
            (lambda a: a.use("othr"), "named 'othr'; there are 'default'"),
            (lambda a: a.remove("default"), "is the active set"),
            (lambda a: a.remove("othr"), "is no set"),
            (lambda a: a.merge(), "cannot be merged, because the activation"),
        ],
    )
    def test_mistakes_are_named(self, adapted, call, message):
        before = logits(adapted)
        with pytest.raises(UserError, match=message):
            call(adapted)
        assert adapted.names == ["default"] and torch.equal(logits(adapted), before)


class TestGains:
    def test_ablating_takes_away_exactly_the_contribution_at_every_decode_step(self, adapted):
        """Of every feature of a layer that fires in a generation, float32, 1e-6."""
        layer = 1
        adapter = adapted.layers[layer]
        inputs = []
        hook = adapted.wrapped[layer].mlp.register_forward_pre_hook(
            lambda _, args: inputs.append(args[0])
        )
        generate(adapted, PROMPTS[:1])
        hook.remove()
        assert len(inputs) == 10
        tried = 0
        with torch.no_grad():
            for x in inputs:
                zero = torch.zeros_like(x)
                adapter.clear_gain()
                before = adapter(x, zero).y
                z = (x @ adapter.W_enc.T + adapter.b_enc).squeeze(0)
                kept = torch.full_like(z, -1)
                k = adapted.config.k or 19
                kept.scatter_(1, z.topk(k).indices, z.topk(k).values)
                for feature in range(19):
                    value = kept[:, feature].relu()
                    adapter.clear_gain()
                    adapter.set_gain(feature, 0.0)
                    contribution = value.unsqueeze(1) * adapter.W_dec[feature]
                    change = adapter(x, zero).y - before
                    torch.testing.assert_close(change.squeeze(0), -contribution, rtol=0, atol=1e-6)
                    tried += bool(value.any())
        assert tried > 10

    def test_rows_of_a_batch_have_gains_of_their_own(self, adapted):
        """Each row as if it were alone with its gain, in every decode step."""
        values = [0.0, 1.0, 3.0]
        expected = []
        for row, value in enumerate(values):
            with adapted.gains({(0, None): value, (2, 7): 1.5}):
                expected.append(
                    generate(
                        adapted,
                        PROMPTS[row : row + 1],
                        output_scores=True,
                        return_dict_in_generate=True,
                    )
                )
        with adapted.gains({(2, 7): 1.5, (0, None): values}):
            found = generate(adapted, output_scores=True, return_dict_in_generate=True)
        for row, alone in enumerate(expected):
            assert torch.equal(found.sequences[row], alone.sequences[0])
            for ours, theirs in zip(found.scores, alone.scores, strict=True):
                torch.testing.assert_close(ours[row], theirs[0], rtol=1e-4, atol=1e-5)
        assert all(adapter.gain is None for adapter in adapted.layers)

    def test_gains_of_rows_leave_statistics_and_gradients_right(self, adapted):
        mask = torch.ones_like(PROMPTS, dtype=torch.bool)
        mask[1, 2:] = False

        def run():
            with sparsity.record(mask) as recorder:
                adapted(PROMPTS).logits.square().sum().backward()
            gradients = [parameter.grad.clone() for parameter in adapted.parameters()]
            for parameter in adapted.parameters():
                parameter.grad = None
            return recorder, gradients

        adapted.set_gain(None, [3, 4], 0.5)
        (expected, theirs) = run()
        adapted.clear_gains()
        for feature in (3, 4):
            adapted.set_gain(None, feature, [0.5, 0.5, 0.5])
        assert adapted.layers[0].gain.shape == (3, 19)
        found, ours = run()
        torch.testing.assert_close(found.l1(), expected.l1())
        assert torch.equal(found.l0_by_token(), expected.l0_by_token())
        assert torch.equal(found.fired(), expected.fired())
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)

    def test_large_gains_of_rows_stay_in_half_precision(self, adapted):
        """Activation times gain is beyond float16; what comes out is not, as with one gain."""
        adapter = adapted.layers[0].half()
        with torch.no_grad():
            adapter.b_enc.fill_(100.0)
            adapter.W_dec.fill_(1e-4)
        x = torch.randn(2, 3, adapter.width, generator=torch.Generator().manual_seed(0)).half()
        adapter.set_gain(None, 1000.0)
        expected = adapter(x, torch.zeros_like(x)).y
        adapter.clear_gain()
        adapter.set_gain(None, [1000.0, 1000.0])
        found = adapter(x, torch.zeros_like(x)).y
        assert expected.isfinite().all() and (expected != 0).all()
        torch.testing.assert_close(found, expected)

    def test_gains_before_the_block_come_back(self, adapted):
        adapted.set_gain(0, 2, 0.5)
        before = logits(adapted)
        with adapted.gains({(0, 2): 0.0, (1, None): -1.0}):
            assert not torch.equal(logits(adapted), before)
        assert torch.equal(logits(adapted), before)
        with (
            pytest.raises(UserError, match="19 is outside"),
            adapted.gains({(0, 1): 2, (1, 19): 0}),
        ):
            pass
        assert torch.equal(logits(adapted), before)

    @pytest.mark.parametrize("place", [7, "37", (1, 2, 3)])
    def test_a_place_that_is_no_pair_is_refused(self, adapted, place):
        before = logits(adapted)
        with (
            pytest.raises(UserError, match=r"is no pair of layer and feature; write \{\(3, 17\)"),
            adapted.gains({(0, None): 0.0, place: 0.0}),
        ):
            pass
        assert torch.equal(logits(adapted), before)

    def test_several_values_for_several_features_could_mean_two_things(self, adapted):
        before = logits(adapted)
        with pytest.raises(UserError, match="2 values for 2 features .* one feature at a time"):
            adapted.set_gain(0, [3, 4], [0.0, 2.0])
        assert torch.equal(logits(adapted), before)

    def test_another_number_of_rows_is_refused(self, adapted):
        adapted.set_gain(0, 2, [0.5, 1.0])
        with pytest.raises(UserError, match="batches of 2 rows"):
            logits(adapted)
        with pytest.raises(UserError, match="3 values, but gains are set for batches of 2"):
            adapted.set_gain(0, 2, [0.5, 1.0, 1.0])

    @pytest.mark.parametrize(
        ("feature", "values"),
        [
            (numpy.int64(3), 0.5),
            (torch.tensor(3), [0.5, 2.0]),
            ([3, 5], 0.5),
            ((3, 5), 0.5),
            (numpy.array([3, 5]), 0.5),
            (torch.tensor([3, 5]), 0.5),
            (numpy.array([3]), [0.5, 2.0]),
        ],
    )
    def test_features_and_gains_may_be_arrays(self, adapted, feature, values):
        layer = adapted.layers[1]
        shape = (19,) if isinstance(values, float) else (2, 19)
        expected = torch.ones(shape)
        for index in [3, 5][: numpy.asarray(feature).size]:
            expected[..., index] = torch.tensor(values)
        for value in (values, numpy.array(values), torch.tensor(values)):
            adapted.clear_gains()
            adapted.set_gain(1, feature, value)
            assert torch.equal(layer.gain, expected)

    @pytest.mark.parametrize(
        ("feature", "value", "message"),
        [
            (torch.tensor([3, 19]), 0.0, "feature: 19 is outside 0..18"),
            (numpy.array([-1]), 0.0, "feature: -1 is outside 0..18"),
            (True, 0.0, "feature: True is no integer"),
            (3.0, 0.0, "feature: 3.0 is no integer"),
            ("x", 0.0, "feature: 'x' is no number"),
            (3, None, "gain: None is no number"),
            (3, "half", "gain: 'half' is no number"),
            (3, [], r"gain: has shape \[0\]; give a number"),
            (3, torch.ones(2, 2), r"gain: has shape \[2, 2\]; give a number"),
            (3, numpy.array([1.0, numpy.inf]), "gain: inf is not finite"),
        ],
    )
    def test_what_is_no_feature_or_gain_is_refused(self, adapted, feature, value, message):
        with pytest.raises(UserError, match=message):
            adapted.set_gain(1, feature, value)
        assert adapted.layers[1].gain is None

    def test_no_feature_changes_nothing(self, adapted):
        before = logits(adapted)
        adapted.set_gain(1, [], 0.0)
        assert torch.equal(logits(adapted), before)


def test_passes_without_a_backward_are_not_observed(adapted):
    logits(adapted)
    assert adapted.layers[0].observer.take() is None
    adapted(PROMPTS)
    assert adapted.layers[0].observer.take() is not None


class TestFeatures:
    def test_the_table_says_what_fires_on_every_token(self, adapted):
        tokenizer = character_tokenizer()
        adapted = tca_fast.attach(tiny_qwen2(vocab_size=len(tokenizer)), adapted.config)
        randomise(adapted)
        table = adapted.features("Wait\n", tokenizer)
        assert table.tokens == ["<bos>", "W", "a", "i", "t", "\n"]
        ids = torch.tensor([tokenizer("Wait\n")["input_ids"]])
        with adapted.record() as recording:
            logits(adapted, ids)
        dense = torch.stack([recording.layer(layer).to_dense() for layer in range(3)])
        for token in range(6):
            found = table.of_token(token)
            assert [value for *_, value in found] == sorted(
                (value for *_, value in found), reverse=True
            )
            assert len(found) == int((dense[:, token] > 0).sum())
            for layer, feature, value in found:
                assert value == dense[layer, token, feature].item()
        assert table.of_feature(1, 4) == dense[1, :, 4].tolist()
        lines = repr(table).splitlines()
        assert len(lines) == 7 and lines[0].startswith("token") and lines[6].startswith("\\n")
        assert table.of_token(-1) == table.of_token(5)
        with pytest.raises(IndexError):
            table.of_token(6)
        for place, message in (((3, 0), "layer: 3 is none of 0..2"), ((1, -1), "feature: -1 is")):
            with pytest.raises(IndexError, match=message):
                table.of_feature(*place)
        layer, feature, value = table.of_token(2)[0]
        assert f"{layer}/{feature} {value:.2f}" in lines[3]

    def test_dropout_is_off_while_a_text_is_run(self, adapted):
        tokenizer = character_tokenizer()
        model = tiny_qwen2(vocab_size=len(tokenizer), attention_dropout=0.5).train()
        adapted = tca_fast.attach(model, adapted.config)
        tables = [adapted.features("Wait", tokenizer) for _ in range(2)]
        assert tables[0].of_token(3) == tables[1].of_token(3) and model.training

    def test_a_model_without_tokenizer_asks_for_one(self, adapted):
        with pytest.raises(UserError, match=r"pass features\(text, tokenizer\)"):
            adapted.features("x")

    @pytest.mark.parametrize("text", [["a", "b"], None, 3, b"abc", []])
    def test_one_text_is_asked_for(self, adapted, text):
        with pytest.raises(UserError, match="text: .* is no text; give one str"):
            adapted.features(text, character_tokenizer())

    def test_a_tokenizer_of_another_model_is_refused(self, adapted):
        with pytest.raises(UserError, match="tokenizer: 'm' is none"):
            adapted.features("hi", "m")
        few = tca_fast.attach(tiny_qwen2(vocab_size=40), adapted.config)
        with pytest.raises(UserError, match=r"tokenizer: gives token \d+, and the model knows 40"):
            few.features("hi", character_tokenizer())

    def test_switched_off_adapters_have_no_features(self, adapted):
        tokenizer = character_tokenizer()
        off = tca_fast.attach(tiny_qwen2(vocab_size=len(tokenizer)), adapted.config)
        with off.disabled(), pytest.raises(UserError, match="adapters: are switched off here"):
            off.features("hi", tokenizer)

    def test_nothing_is_recorded_or_computed_when_off(self, adapted, monkeypatch):
        with adapted.record() as recording:
            logits(adapted)
        assert len(recording.steps) == 1
        encoded = []
        monkeypatch.setattr(type(adapted.layers[0]), "encode", lambda *_: encoded.append(1))
        logits(adapted)
        assert len(recording.steps) == 1 and not encoded
        with pytest.raises(UserError, match="layer: 3 did not run"):
            recording.layer(3)
