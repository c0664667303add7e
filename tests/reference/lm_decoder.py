"""Plain NumPy decoder in float64, one token, head and expert at a time: the oracle of jaxrl_suite.lm."""

import math

import jax.numpy as jnp
import numpy as np

from jaxrl_suite.lm import parameter_shapes, unflatten


def parameters(config, seed=0, dtype=np.float32):
    """Random parameters of a model: NumPy draws, so that nothing is compiled; norms and biases away from 1 and 0."""
    generator = np.random.default_rng(seed)

    def leaf(path, shape):
        drawn = generator.standard_normal(shape)
        if path.endswith(("scale", "query_norm", "key_norm")):
            return 1 + 0.2 * drawn
        return drawn * (0.2 if path.endswith("_bias") else config.init_std)

    return unflatten({path: jnp.asarray(leaf(path, s), dtype) for path, s in parameter_shapes(config).items()})


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def silu(x):
    return x / (1 + np.exp(-x))


def rms_norm(x, scale, eps):
    return x / np.sqrt((x * x).mean() + eps) * scale


def rotate(x, position, frequencies, factor=1.0):
    """Pairs (i, i + C/2) turned by position * frequency."""
    half = len(x) // 2
    y = np.empty_like(x)
    for i in range(half):
        c, s = factor * math.cos(position * frequencies[i]), factor * math.sin(position * frequencies[i])
        y[i], y[i + half] = x[i] * c - x[i + half] * s, x[i + half] * c + x[i] * s
    return y


def attention(q, k, v, positions, segments, window=None):
    """q [T, Hq, C], k and v [T, Hk, C]; causal in positions, within a segment."""
    T, Hq, C = q.shape
    group = Hq // k.shape[1]
    out = np.zeros_like(q)
    for t in range(T):
        seen = [
            s
            for s in range(T)
            if segments[s] == segments[t]
            and positions[s] <= positions[t]
            and (window is None or positions[t] - positions[s] < window)
        ]
        for h in range(Hq):
            weights = softmax(np.array([q[t, h] @ k[s, h // group] for s in seen]) / math.sqrt(C))
            out[t, h] = sum(w * v[s, h // group] for w, s in zip(weights, seen))
    return out


def route(logits, config, bias=None):
    """Experts and weights of one token."""
    if config.router_score == "softmax":
        scores = softmax(logits)
    else:
        scores = 1 / (1 + np.exp(-logits))
    selection = scores + (0 if bias is None else bias)
    if config.router_groups > 1:
        size = len(logits) // config.router_groups
        per_group = max(1, config.experts_per_token // config.router_top_groups)
        value = [
            np.sort(selection[g * size : (g + 1) * size])[::-1][:per_group].sum() for g in range(config.router_groups)
        ]
        best = np.argsort(-np.array(value), kind="stable")[: config.router_top_groups]
        selection = np.array([s if i // size in best else -np.inf for i, s in enumerate(selection)])
    experts = np.argsort(-selection, kind="stable")[: config.experts_per_token]
    weights = scores[experts]
    if config.router_normalize:
        weights = weights / weights.sum()
    return experts, weights * config.router_scale


def feed_forward(p, x, config):
    """One token x [D]."""

    def mlp(p, x):
        return (silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]

    if not config.num_experts:
        return mlp(p, x)
    experts, weights = route(x @ p["router"], config, p.get("router_bias"))
    y = sum(w * mlp({n: p["experts"][n][e] for n in p["experts"]}, x) for e, w in zip(experts, weights))
    if "shared" in p:
        gate = 1 / (1 + np.exp(-(x @ p["shared_gate"]))) if "shared_gate" in p else 1.0
        y = y + gate * mlp(p["shared"], x)
    return y


def logits(params, tokens, config, frequencies, positions=None, segments=None, factor=1.0):
    """One sequence: tokens [T] -> [T, V]."""
    T = len(tokens)
    positions = np.arange(T) if positions is None else positions
    segments = np.ones(T, int) if segments is None else segments
    x = params["embed"]["table"][tokens]
    for layer in range(config.num_layers):
        p = _take(params["layers"], layer)
        a = p["attention"]
        h = np.stack([rms_norm(row, p["attention_norm"]["scale"], config.norm_eps) for row in x])
        q, k, v = (np.einsum("td,dhc->thc", h, a[n]) + a.get(f"{n}_bias", 0.0) for n in ("query", "key", "value"))
        for array, norm in ((q, "query_norm"), (k, "key_norm")):
            for t in range(T):
                for i in range(array.shape[1]):
                    if norm in a:
                        array[t, i] = rms_norm(array[t, i], a[norm], config.norm_eps)
                    array[t, i] = rotate(array[t, i], positions[t], frequencies, factor)
        out = attention(q, k, v, positions, segments, config.layer_windows[layer])
        x = x + np.einsum("thc,hcd->td", out, a["output"])
        h = np.stack([rms_norm(row, p["feed_forward_norm"]["scale"], config.norm_eps) for row in x])
        x = x + np.stack([feed_forward(p["feed_forward"], row, config) for row in h])
    x = np.stack([rms_norm(row, params["final_norm"]["scale"], config.norm_eps) for row in x])
    table = params["head"]["table"] if "head" in params else params["embed"]["table"]
    return x @ table.T


def _take(tree, index):
    return {k: _take(v, index) if isinstance(v, dict) else v[index] for k, v in tree.items()}
