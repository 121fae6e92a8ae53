"""An independent oracle: CODI in float64, without cache, batch, padding, or model code of this project or transformers.

Every step recomputes the whole sequence; attention is a loop over heads. Only weights and configuration
are taken from the model under test.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def rms(x, weight, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def frequencies(config):
    """Rotary frequencies; llama3 scaling after Grattafiori et al. 2024: long waves slowed, the band between blended."""
    rope = config.rope_parameters
    d = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    plain = [rope["rope_theta"] ** (-2 * i / d) for i in range(d // 2)]
    if rope["rope_type"] == "default":
        return torch.tensor(plain, dtype=torch.float64)
    assert rope["rope_type"] == "llama3"
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    scaled = []
    for f in plain:
        turns = rope["original_max_position_embeddings"] * f / (2 * math.pi)  # in the original context
        share = min(max((turns - low) / (high - low), 0.0), 1.0)
        scaled.append(share * f + (1 - share) * f / rope["factor"])
    return torch.tensor(scaled, dtype=torch.float64)


def turn(x, angles):
    """x (position, d_head), angles (position, d_head / 2): pairs (i, i + d/2) turned as complex numbers."""
    half = x.shape[1] // 2
    z = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((z.real, z.imag), dim=1)


def attend(q, k, v, window):
    scores = q @ k.T / math.sqrt(q.shape[1])
    distance = torch.arange(len(q))[:, None] - torch.arange(len(k))
    seen = (distance >= 0) & (distance < (window or len(k)))
    scores[~seen] = -math.inf
    return scores.softmax(-1) @ v


class Oracle:
    """float64 copy of a CodiModel's weights; `states(embeddings)` is one full forward pass of one sequence."""

    def __init__(self, model):
        self.config = model.base.config
        self.w = {name: value.double() for name, value in model.base.state_dict().items()}
        self.prj = {name: value.double() for name, value in model.prj.state_dict().items()}
        self.protocol = model.protocol
        self.gpt2 = self.config.model_type == "gpt2"
        self.embedding = self.w["transformer.wte.weight" if self.gpt2 else "model.embed_tokens.weight"]

    def linear(self, name, x):
        weight = self.w[name + ".weight"]
        bias = self.w.get(name + ".bias", 0.0)
        return x @ (weight if self.gpt2 else weight.T) + bias

    def states(self, embeddings):
        """(position, layer 0..n_layers, d_model), and per layer the keys and values (kv_head, position, d_head)."""
        return self.gpt2_states(embeddings) if self.gpt2 else self.llama_states(embeddings)

    def llama_states(self, x):
        c = self.config
        d = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        group = c.num_attention_heads // c.num_key_value_heads
        angles = torch.arange(len(x), dtype=torch.float64)[:, None] * frequencies(c)
        window = c.sliding_window if c.model_type == "mistral" else None
        states, cached = [x], []
        for layer in range(c.num_hidden_layers):
            p = f"model.layers.{layer}."
            y = rms(x, self.w[p + "input_layernorm.weight"], c.rms_norm_eps)
            q, k, v = (self.linear(p + f"self_attn.{n}_proj", y).split(d, dim=1) for n in "qkv")
            if p + "self_attn.q_norm.weight" in self.w:
                q = [rms(h, self.w[p + "self_attn.q_norm.weight"], c.rms_norm_eps) for h in q]
                k = [rms(h, self.w[p + "self_attn.k_norm.weight"], c.rms_norm_eps) for h in k]
            k = [turn(h, angles) for h in k]
            heads = [attend(turn(h, angles), k[i // group], v[i // group], window) for i, h in enumerate(q)]
            x = x + self.linear(p + "self_attn.o_proj", torch.cat(heads, dim=1))
            y = rms(x, self.w[p + "post_attention_layernorm.weight"], c.rms_norm_eps)
            gate = self.linear(p + "mlp.gate_proj", y)
            x = x + self.linear(p + "mlp.down_proj", gate * gate.sigmoid() * self.linear(p + "mlp.up_proj", y))
            states.append(x)
            cached.append((torch.stack(k), torch.stack(v)))
        states[-1] = rms(x, self.w["model.norm.weight"], c.rms_norm_eps)
        return torch.stack(states, dim=1), cached

    def gpt2_states(self, x):
        c = self.config
        eps, d = c.layer_norm_epsilon, c.n_embd // c.n_head
        x = x + self.w["transformer.wpe.weight"][: len(x)]
        states, cached = [x], []

        def norm(name, y):
            return F.layer_norm(y, y.shape[-1:], self.w[name + ".weight"], self.w[name + ".bias"], eps)

        for layer in range(c.n_layer):
            p = f"transformer.h.{layer}."
            q, k, v = (
                part.split(d, dim=1)
                for part in self.linear(p + "attn.c_attn", norm(p + "ln_1", x)).split(c.n_embd, dim=1)
            )
            heads = [attend(*h, None) for h in zip(q, k, v, strict=True)]
            x = x + self.linear(p + "attn.c_proj", torch.cat(heads, dim=1))
            y = self.linear(p + "mlp.c_fc", norm(p + "ln_2", x))
            y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
            x = x + self.linear(p + "mlp.c_proj", y)
            states.append(x)
            cached.append((torch.stack(k), torch.stack(v)))
        states[-1] = norm("transformer.ln_f", x)
        return torch.stack(states, dim=1), cached

    def project(self, h):
        p = self.prj
        y = h @ p["1.weight"].T + p["1.bias"]
        y = 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))
        y = y @ p["3.weight"].T + p["3.bias"]
        y = (y - y.mean()) / (y.var(unbiased=False) + 1e-5).sqrt()
        return y * p["ln.weight"] + p["ln.bias"]

    def logits(self, h):
        head = self.w["lm_head.weight"]
        values = h @ head.T
        values[list(self.protocol.excluded_logits)] = -math.inf
        return values

    def run(self, input_ids, n_latents):
        """Embeddings of the whole sequence (prompt and latents), its states and cached keys and values."""
        x = self.embedding[torch.tensor(input_ids)]
        for _ in range(n_latents):
            h = self.states(x)[0][-1, -1]
            x = torch.cat((x, self.project(h)[None]))
        states, cached = self.states(x)
        return x, states, cached

    def answer(self, x, tokens, max_new_tokens):
        """Greedy answer after the embeddings x and some tokens. Returns its tokens and the first logits."""
        first, answer = None, []
        for token in tokens:
            x = torch.cat((x, self.embedding[token][None]))
        for _ in range(max_new_tokens):
            logits = self.logits(self.states(x)[0][-1, -1])
            first = logits if first is None else first
            token = int(logits.argmax())
            if token == self.protocol.eos_id:
                break
            answer.append(token)
            x = torch.cat((x, self.embedding[token][None]))
        return answer, first
