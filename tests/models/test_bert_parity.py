"""BERT against transformers: every stage, the pooler, masked language modelling, and the gradient of every parameter.

We compute in float32, the reference in float64, so that the difference is our rounding alone; the tolerances are those
of `test_vit_parity.py`, for the reasons given there: float32 carries 6e-8, a dot product of length n = 768 has a
relative error of about sqrt(n) * 6e-8 = 2e-6, and some layers add up to a few times that. A gradient may be off by
more where that of transformers in float32 is, too. Texts of different lengths share a batch, and only what lies within
them is compared.
"""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtl.errors import UserError
from jaxtl.models import presets, stages
from jaxtl.weights import configs, convert, files, tables

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

FORWARD, GRADIENT = 2e-5, 1e-4
LENGTHS = np.array([12, 5, 1], np.int32)
POSITIONS = np.array([[1, 7], [4, 2], [0, 0]], np.int32)  # of the tokens that masked language modelling predicts
WITHIN = np.arange(LENGTHS.max()) < LENGTHS[:, None]
SMALL = dict(vocab_size=50, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
BASE_WIDTH = dict(vocab_size=1000, num_hidden_layers=2)  # BERT-base, but for its length


def randomized(kind, **config):
    """A model with every parameter off its initial value: zero biases and unit scales would hide a mix-up."""
    model = kind(transformers.BertConfig(**config))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def saved(model, folder):
    model.save_pretrained(folder)
    return folder


class Port:
    """What our own config and weight tables make of a folder in Hugging Face's layout."""

    def __init__(self, folder, top, build=None):
        config = configs.read_config(folder)
        self.table = tables.table(config, top=top)
        build = build or (lambda rngs: presets.backbone(config, top=top, dtype=jnp.float32, rngs=rngs))
        self.structure, self.targets, self.names = stages.abstract(build)
        self.params = self.read(files.Checkpoint(folder))

    def read(self, source):
        return convert.read(self.table, source, self.targets, "the reference")

    def gradients_of(self, model):
        """The gradients that torch left in a model's parameters, by our paths: they convert as the weights do."""
        gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
        return self.read({name: value.numpy() for name, value in gradients.items()})


def batch(vocabulary):
    ids = np.random.default_rng(0).integers(0, vocabulary, WITHIN.shape).astype(np.int32)
    return stages.Sequence(jnp.asarray(ids), jnp.asarray(LENGTHS))


def torch_inputs(x):
    return {
        "input_ids": torch.from_numpy(np.array(x.values, np.int64)),
        "attention_mask": torch.from_numpy(WITHIN.astype(np.int64)),
    }


def assert_close(ours, theirs, tolerance, what):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape, what
    error, largest = np.abs(ours - theirs).max(), np.abs(theirs).max()
    assert error <= tolerance * largest, f"{what}: off by {error:.3g}, largest value {largest:.3g}"


def assert_gradients_close(ours, exact, rounded):
    assert ours.keys() == exact.keys()
    largest = max(np.abs(value).max() for value in exact.values())
    for path, value in exact.items():
        if path.endswith("attention/key/bias"):
            # Softmax ignores a constant added to all scores: this gradient is zero, what is left is rounding.
            assert np.abs(ours[path]).max() <= GRADIENT * largest, path
        else:
            floor = np.abs(rounded[path] - value).max() / np.abs(value).max()
            assert_close(ours[path], value, max(GRADIENT, 2 * floor), path)


def compare(model, folder):
    """Compares our port of a BertModel, with its pooler, at every stage and in every gradient."""
    port = Port(folder, "pooler")
    x = batch(model.config.vocab_size)
    # A loss that reads every output with another weight, so that no two gradients cancel.
    random = np.random.default_rng(1)
    token_weights = random.standard_normal((*WITHIN.shape, model.config.hidden_size)) * WITHIN[..., None]
    pooled_weights = random.standard_normal((len(LENGTHS), model.config.hidden_size))

    def reference(model):
        theirs = model(**torch_inputs(x), output_hidden_states=True)
        dtype = theirs.pooler_output.dtype
        loss = (theirs.last_hidden_state * torch.from_numpy(token_weights).to(dtype)).sum()
        (loss + (theirs.pooler_output * torch.from_numpy(pooled_weights).to(dtype)).sum()).backward()
        return theirs, port.gradients_of(model)

    _, rounded = reference(copy.deepcopy(model))
    theirs, exact = reference(model.double())

    def trace(params):
        bound, y, outputs = stages.bind(port.structure, params), x, {}
        for name in port.names:
            y = bound(y, start=name, stop=name)
            outputs[name] = stages.values(y)
        tokens = jnp.where(WITHIN[..., None], outputs[port.names[-2]], 0.0)
        return jnp.sum(tokens * token_weights) + jnp.sum(outputs["pooler"] * pooled_weights), outputs

    gradients, outputs = jax.jit(jax.grad(trace, has_aux=True))(port.params)
    assert port.names == ("embeddings", *(f"layer_{i + 1}" for i in range(model.config.num_hidden_layers)), "pooler")
    for name, state in zip(port.names, theirs.hidden_states, strict=False):
        assert_close(np.asarray(outputs[name])[WITHIN], state.detach().numpy()[WITHIN], FORWARD, name)
    assert_close(outputs["pooler"], theirs.pooler_output.detach(), FORWARD, "pooler")
    assert_gradients_close(gradients, exact, rounded)


def test_bert_equals_transformers_at_every_stage_and_in_every_gradient(tmp_path):
    model = randomized(transformers.BertModel, **BASE_WIDTH)
    compare(model, saved(model, tmp_path))


@pytest.mark.weights
@pytest.mark.slow
def test_real_minilm_equals_transformers(real_weights):
    folder = real_weights / "minilm-l6"
    compare(transformers.BertModel.from_pretrained(folder).eval(), folder)
    assert not presets.same_architecture(configs.read_config(folder), presets.PRESETS["minilm_l6"])


def test_masked_language_model_equals_transformers_in_logits_loss_and_gradients_of_the_tied_table(tmp_path):
    model = randomized(transformers.BertForMaskedLM, **BASE_WIDTH)
    saved(model, tmp_path)
    x = batch(1000)._replace(positions=jnp.asarray(POSITIONS))
    answers = np.random.default_rng(2).integers(0, 1000, POSITIONS.shape)
    weights = np.array([[1, 1], [1, 1], [1, 0]], np.float32)  # the last text has one token only

    build = presets.model(
        configs.read_config(tmp_path),
        kind="mlm",
        reads="masked",
        hidden=0,
        dropout=0.0,
        init="zero",
        classes=2,
        inputs=jax.tree.map(lambda a: jax.ShapeDtypeStruct((1, *a.shape[1:]), a.dtype), x),
        precision="float32",
    )
    port = Port(tmp_path, "mlm", build)
    assert port.names == ("embeddings", "layer_1", "layer_2", "features", "mlm")
    assert [path for path, leaf in port.targets.items() if leaf.shape == (1000, 768)] == ["embeddings/word"]

    def loss(params):
        logits = stages.bind(port.structure, params)(x)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), answers[..., None], axis=-1)[..., 0]
        return -jnp.sum(picked * weights) / jnp.sum(weights), logits

    labels = np.full(WITHIN.shape, -100)
    for row in range(len(LENGTHS)):
        for column in np.flatnonzero(weights[row]):
            labels[row, POSITIONS[row, column]] = answers[row, column]

    def reference(model):
        theirs = model(**torch_inputs(x), labels=torch.from_numpy(labels))
        theirs.loss.backward()
        return theirs, port.gradients_of(model)

    _, rounded = reference(copy.deepcopy(model))
    theirs, exact = reference(model.double())
    (value, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(port.params)
    expected = theirs.logits.detach().numpy()
    assert_close(logits, np.take_along_axis(expected, POSITIONS[..., None], axis=1), FORWARD, "logits")
    assert_close(value, theirs.loss.detach(), FORWARD, "loss")
    assert_gradients_close(gradients, exact, rounded)

    # The backbone alone gives the logits of every token.
    whole = Port(tmp_path, "mlm")
    everywhere = jax.jit(lambda params: stages.bind(whole.structure, params)(x))(whole.params)
    assert_close(np.asarray(everywhere)[WITHIN], expected[WITHIN], FORWARD, "logits everywhere")


def test_tied_table_stays_one_array_and_its_gradient_is_the_sum_over_both_uses():
    def build(rngs):
        return presets.backbone(presets.PRESETS["bert_nano"], top="mlm", dtype=jnp.float32, rngs=rngs)

    structure, targets, _ = stages.abstract(build)
    params = stages.initialize(build, jax.random.key(0), targets)
    assert [path for path, leaf in targets.items() if leaf.shape == (30_522, 64)] == ["embeddings/word"]
    model = stages.bind(structure, params)
    assert model.mlm.word is model.embeddings.word
    x = stages.Sequence(jnp.array([[3, 5]]), jnp.array([2]))

    @jax.jit
    @jax.grad
    def gradients(word):
        return jnp.sum(stages.bind(structure, params | {"embeddings/word": word})(x)[..., :10])

    word = np.asarray(gradients(params["embeddings/word"]))
    # The decoder reads words 0 to 9 here, the embeddings 3 and 5.
    assert np.abs(word[:10]).max(axis=1).min() > 0
    assert np.abs(word[10:]).max() == 0
    np.testing.assert_allclose(word[0], word[1], rtol=1e-6)
    assert np.abs(word[[3, 5]] - word[0]).max() > 1e-3


def renamed(state, old_norms, prefix):
    """Names as early checkpoints have them, and as a model with a head on top saves them."""
    for old, new in (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")):
        state = {name.replace(old, new) if old_norms else name: value for name, value in state.items()}
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize("prefix", ["", "bert."])
@pytest.mark.parametrize("old_norms", [False, True])
def test_torch_file_with_old_and_new_names_with_and_without_prefix_is_read(tmp_path, prefix, old_norms):
    model = randomized(transformers.BertModel, **SMALL)
    expected = Port(saved(model, tmp_path / "safetensors"), "pooler").params
    state = renamed(model.state_dict(), old_norms, prefix)
    state[f"{prefix}embeddings.position_ids"] = torch.arange(512)[None]
    state["cls.seq_relationship.weight"] = torch.zeros(2, 64)
    (tmp_path / "bin").mkdir()
    torch.save(state, tmp_path / "bin" / "pytorch_model.bin")
    model.config.save_pretrained(tmp_path / "bin")
    found = Port(tmp_path / "bin", "pooler").params
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, path)


def test_top_that_the_checkpoint_lacks_is_left_out_and_half_a_top_is_an_error(tmp_path):
    folder = saved(randomized(transformers.BertModel, **SMALL), tmp_path)
    whole = Port(folder, None)
    port = Port(folder, "mlm")
    assert {path for path in port.targets if path not in port.params} == {
        *("mlm/dense/kernel", "mlm/dense/bias", "mlm/norm/scale", "mlm/norm/bias", "mlm/bias")
    }
    assert port.params.keys() == whole.params.keys()

    source = dict(files.Checkpoint(folder))
    del source["pooler.dense.bias"]
    table = Port(folder, "pooler")
    with pytest.raises(UserError, match=r"missing: pooler/dense/bias \(their pooler.dense.bias\)"):
        table.read(source)
    del source["pooler.dense.weight"]
    assert table.read(source).keys() == whole.params.keys()
    del source["encoder.layer.0.output.dense.bias"], source["encoder.layer.1.output.dense.bias"]
    with pytest.raises(UserError, match=r"layer_\*/mlp/fc2/bias .* in 2 layers"):
        table.read(source)


def test_bias_of_masked_language_models_that_only_the_decoder_names_is_found(tmp_path):
    folder = saved(randomized(transformers.BertForMaskedLM, **SMALL), tmp_path)
    port = Port(folder, "mlm")
    source = dict(files.Checkpoint(folder))
    source["cls.predictions.decoder.bias"] = source.pop("cls.predictions.bias")
    np.testing.assert_array_equal(port.read(source)["mlm/bias"], port.params["mlm/bias"])


@pytest.mark.parametrize(("top", "kind"), [("mlm", "BertForMaskedLM"), ("pooler", "BertForSequenceClassification")])
def test_export_is_read_by_transformers_under_its_own_names(tmp_path, top, kind):
    from safetensors.numpy import save_file

    kind = getattr(transformers, kind)
    model = randomized(kind, **SMALL)
    port = Port(saved(model, tmp_path / "theirs"), top)
    written = convert.write(port.table, port.params, prefix="bert.")
    assert written.keys() <= model.state_dict().keys()
    (tmp_path / "ours").mkdir()
    save_file(written, tmp_path / "ours" / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(tmp_path / "ours")
    again, report = kind.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert set(report["missing_keys"]) <= {"classifier.weight", "classifier.bias"}
    state = again.state_dict()
    for name, value in model.state_dict().items():
        if not name.startswith("classifier."):
            np.testing.assert_array_equal(state[name], value, name)
