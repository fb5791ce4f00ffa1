"""ViT, DeiT and DINOv2 against transformers: every stage, the logits, and the gradient of every parameter.

We compute in float32, the reference in float64, so that the difference is our rounding alone. float32 carries 6e-8;
a dot product of length n has a relative error of about sqrt(n) * 6e-8 (n = 768: 2e-6), and a dozen blocks add up to a
few times that. 2e-5 of the largest value for activations and 1e-4 for gradients, which pass through every block twice,
leave room for that and for nothing else: a wrong GELU alone is off by 1e-3. The attention of a trained model is
sharper, its query gradients are small differences of large numbers: there transformers itself, in float32, is up to
1.1e-4 away from its float64 result. XLA's CPU backend sums in sequence what torch sums by halves: over the parameters
of DINOv2-small at 518 pixels its rounding is 2.4 times torch's in the median and 7 times at worst (without AVX-512). We
may be ten times as far away as transformers is.
"""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtl.models import presets, stages
from jaxtl.weights import configs, convert, files, tables

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

FORWARD, GRADIENT = 2e-5, 1e-4


def randomize(model):
    """Moves every parameter off its initial value: zero biases and unit scales would hide a mix-up."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def read(folder):
    """Reads a folder in Hugging Face's layout through our own config and weight tables."""
    config = configs.read_config(folder)
    top = "classifier" if config.classes else None

    def build(rngs):
        return presets.backbone(config, top=top, dtype=jnp.float32, rngs=rngs)

    structure, targets, names = stages.abstract(build)
    table = tables.table(config, top=top)
    params = convert.read(table, files.Checkpoint(folder), targets, str(folder))
    return structure, {path: jnp.asarray(value) for path, value in params.items()}, names


def assert_close(ours, theirs, tolerance, what):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape, what
    error, largest = np.abs(ours - theirs).max(), np.abs(theirs).max()
    assert error <= tolerance * largest, f"{what}: off by {error:.3g}, largest value {largest:.3g}"


def reference(model, images, direction, folder):
    """Returns the model's hidden states, output and gradients (of the output along `direction`) in its own dtype.

    The gradients travel through the same conversion as weights do: they are saved as those of a second checkpoint.
    """
    dtype = next(model.parameters()).dtype
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).to(dtype)
    interpolate = {} if model.config.model_type == "dinov2" else {"interpolate_pos_encoding": True}
    theirs = model(pixel_values=pixels, output_hidden_states=True, **interpolate)
    hidden = [state.detach().numpy() for state in theirs.hidden_states]
    output = theirs.logits if hasattr(theirs, "logits") else theirs.last_hidden_state
    (output * torch.from_numpy(direction).to(dtype)).sum().backward()
    gradients = copy.deepcopy(model)
    with torch.no_grad():
        for target, source in zip(gradients.parameters(), model.parameters(), strict=True):
            target.copy_(torch.zeros_like(source) if source.grad is None else source.grad)
    gradients.save_pretrained(folder)
    return hidden, output.detach().numpy(), read(folder)[1]


def compare(model, folder, size, batch=2):
    """Compares our port of what `model.save_pretrained(folder)` wrote with the model itself, run in float64.

    A parameter's gradient may be off by more than the tolerance where that of transformers in float32 is, too.
    """
    structure, params, names = read(folder)
    images = np.random.default_rng(0).standard_normal((batch, size, size, 3)).astype(np.float32)

    def trace(params):
        bound = stages.bind(structure, params)
        x, outputs = jnp.asarray(images), {}
        for name in names:
            x = outputs[name] = bound(x, start=name, stop=name)
        return outputs

    ours = jax.jit(trace)(params)
    # A loss that reads every output with another weight, so that no two gradients cancel.
    direction = np.random.default_rng(1).standard_normal(ours[names[-1]].shape).astype(np.float32)
    _, _, rounded = reference(copy.deepcopy(model), images, direction, folder / "float32")
    hidden, output, exact = reference(model.double(), images, direction, folder / "float64")

    for name, state in zip(names, hidden, strict=False):
        if name != "norm":  # transformers puts the normalised state last for some models, and not for others
            assert_close(ours[name], state, FORWARD, name)
    assert_close(ours[names[-1]], output, FORWARD, "output")

    gradients = jax.jit(jax.grad(lambda p: jnp.sum(trace(p)[names[-1]] * direction)))(params)
    assert gradients.keys() == exact.keys()
    largest = max(np.abs(value).max() for value in exact.values())
    for path, value in exact.items():
        if path.endswith("attention/key/bias"):
            # Softmax ignores a constant added to all scores: this gradient is zero, what is left is rounding.
            assert np.abs(gradients[path]).max() <= GRADIENT * largest, path
        else:
            floor = np.abs(rounded[path] - value).max() / np.abs(value).max()
            assert_close(gradients[path], value, max(GRADIENT, 10 * floor), path)


DEIT_BASE = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072)


@pytest.mark.slow
def test_deit_base_distilled_equals_transformers(tmp_path):
    config = transformers.DeiTConfig(**DEIT_BASE, num_labels=1000)
    model = randomize(transformers.DeiTForImageClassificationWithTeacher(config))
    model.save_pretrained(tmp_path)
    compare(model, tmp_path, 224)


@pytest.mark.slow
def test_vit_base_equals_transformers_with_and_without_its_classifier(tmp_path):
    config = transformers.ViTConfig(**(DEIT_BASE | {"num_hidden_layers": 4}), num_labels=1000)
    for kind in (transformers.ViTForImageClassification, transformers.ViTModel):
        folder = tmp_path / kind.__name__
        model = randomize(kind(config))
        model.save_pretrained(folder)
        compare(model, folder, 224)


@pytest.mark.parametrize("size", [224, 160])
def test_deit_interpolates_positions_to_other_image_sizes(tmp_path, size):
    config = transformers.DeiTConfig(
        hidden_size=192, num_hidden_layers=2, num_attention_heads=3, intermediate_size=768, num_labels=10
    )
    model = randomize(transformers.DeiTForImageClassificationWithTeacher(config))
    model.save_pretrained(tmp_path)
    compare(model, tmp_path, size)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "heads", "depth", "swiglu"),
    [(384, 6, 12, False), (768, 12, 2, False), (1024, 16, 2, False), (1536, 24, 2, True)],
    ids=["small", "base-width", "large-width", "giant-width-swiglu"],
)
def test_dinov2_equals_transformers(tmp_path, width, heads, depth, swiglu):
    config = transformers.Dinov2Config(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        image_size=518,
        patch_size=14,
        use_swiglu_ffn=swiglu,
    )
    model = randomize(transformers.Dinov2Model(config))
    model.save_pretrained(tmp_path)
    compare(model, tmp_path, 224)


@pytest.mark.weights
@pytest.mark.slow
@pytest.mark.parametrize("size", [224, 518])
def test_dinov2_real_checkpoint_equals_transformers(real_weights, tmp_path, size):
    model = transformers.Dinov2Model.from_pretrained(real_weights / "dinov2-small").eval()
    model.save_pretrained(tmp_path)
    compare(model, tmp_path, size, batch=1)


def test_bfloat16_stays_near_float32_and_keeps_float32_parameters():
    def output(dtype):
        config = presets.PRESETS["vit_nano_patch2_8"]

        def build(rngs):
            return presets.backbone(config, top=None, dtype=jnp.dtype(dtype), rngs=rngs)

        structure, targets, _ = stages.abstract(build)
        assert {str(leaf.dtype) for leaf in targets.values()} == {"float32"}
        params = stages.initialize(build, jax.random.key(0), targets)
        return stages.bind(structure, params)(jnp.asarray(images))

    images = np.random.default_rng(0).standard_normal((2, 8, 8, 3)).astype(np.float32)
    half, full = output("bfloat16"), output("float32")
    assert half.dtype == jnp.bfloat16
    assert full.dtype == jnp.float32
    # bfloat16 carries 8 bits: 4e-3 a rounding, some dozen roundings along four blocks.
    assert np.abs(half.astype(np.float32) - full).max() < 0.05 * np.abs(full).max()


def test_norm_and_softmax_are_computed_in_float32_under_bfloat16(monkeypatch):
    """As traced on an accelerator: on a CPU, attention's bfloat16 operands are widened to float32 first."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    config = presets.PRESETS["vit_nano_patch2_8"]

    def build(rngs):
        return presets.backbone(config, top="classifier", dtype=jnp.dtype("bfloat16"), rngs=rngs)

    config = dataclasses.replace(config, classes=10)
    structure, targets, _ = stages.abstract(build)
    images = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    traced = jax.make_jaxpr(lambda params, images: stages.bind(structure, params)(images))(targets, images)

    def equations(jaxpr):
        for equation in jaxpr.eqns:
            yield equation
            for inner in jax.core.jaxprs_in_params(equation.params):
                yield from equations(inner)

    dtypes = {"rsqrt": set(), "exp": set(), "dot_general": set()}
    for equation in equations(traced.jaxpr):
        if equation.primitive.name in dtypes:
            dtypes[equation.primitive.name].add(str(equation.invars[0].aval.dtype))
    assert dtypes == {"rsqrt": {"float32"}, "exp": {"float32"}, "dot_general": {"bfloat16"}}
