"""The paper's equations written plainly and slowly: the oracle of every fast path.

They take one sequence at a time and neither pack nor chunk. A model is anything with `model(input_ids [1, L]).logits`
and a `config`. Random numbers come from SplitMix64 in plain integers, which checks the vectorised ones too.
"""

import itertools
import math

import torch

ALL = (1 << 64) - 1
DROPOUT, GUMBEL, REMASK = 5, 16, 17


def reference_bits(*key):
    state = 0
    for word in key:
        state = ((state ^ (word & ALL)) + 0x9E3779B97F4A7C15) & ALL
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & ALL
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & ALL
        state = state ^ (state >> 31)
    return state


def reference_uniform(*key):
    return ((reference_bits(*key) >> 12) + 0.5) / 2**52


def is_dropped(seed, sample, epoch, position, complement, branch, number, rate):
    """Say whether training.dropout zeroes a number of a branch of a token: a 16-bit draw, the sign bit turned."""
    token = reference_bits(seed, DROPOUT, sample, epoch, position, complement)
    draw = reference_bits(token, branch, number // 4) >> 16 * (number % 4) & 0xFFFF
    return (draw ^ 0x8000) < round(rate * 2**16)


def average_of_weights(history, decay):
    """Return a_N of training.average from the weights before the first and after every update, in fp64.

    Every w_n counts with 1 - beta_n and fades with each later beta; the weights at the start fade with all of them.
    """
    betas = [1 - 1.0, *(min(decay, (1 + n) / (10 + n)) for n in range(1, len(history)))]
    total = torch.zeros_like(history[0], dtype=torch.float64)
    for n, weight in enumerate(history):
        total += (1 - betas[n]) * math.prod(betas[n + 1 :]) * weight.double()
    return total


@torch.no_grad()
def logits_of(model, ids):
    return model(torch.tensor([ids])).logits[0].double()


def log_p_of(model, ids):
    """Return the log-probabilities of all ids but MASK, which is no token of a text."""
    logits = logits_of(model, ids)
    logits[:, model.config.mask_token_id] = -math.inf
    return logits.log_softmax(-1)


@torch.no_grad()
def logits_with_past(model, ids, start, past, stop=None):
    """Return the logits of the positions from `start` to `stop`; they attend to the old keys and values of all others.

    `past` is a list of (keys, values), one for each layer; the new ones are written into it.
    """
    stop = len(ids) if stop is None else stop
    config, trunk = model.config, model.model
    group = config.num_attention_heads // config.num_key_value_heads
    where = torch.arange(start, stop, dtype=torch.float32)[:, None, None]
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    turn = torch.polar(torch.ones(()), where * config.rope_theta**-pairs)

    def rotated(x):  # a pair (i, i + half) is a complex number, turned by its angle
        first, second = x.chunk(2, -1)
        turned = torch.complex(first, second) * turn
        return torch.cat((turned.real, turned.imag), -1)

    hidden = trunk.embed_tokens(torch.tensor(ids[start:stop]))
    for n, block in enumerate(trunk.layers):
        normal = block.input_layernorm(hidden)
        q, k, v = (
            getattr(block.self_attn, f"{name}_proj")(normal).unflatten(-1, (-1, config.head_dim)) for name in "qkv"
        )
        q, k = rotated(q), rotated(k)
        if start:
            pairs = zip(past[n], (k, v), strict=True)
            k, v = (torch.cat((old[:start], new, old[stop : len(ids)])) for old, new in pairs)
        past[n] = (k, v)
        k, v = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
        weights = (q.transpose(0, 1) @ k.transpose(1, 2) / math.sqrt(config.head_dim)).softmax(-1)
        hidden = hidden + block.self_attn.o_proj((weights @ v).transpose(0, 1).flatten(1))
        hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))
    return model.lm_head(trunk.norm(hidden)).double()


def reference_loss(model, ids, lengths, times, uniforms, epsilon=1e-3):
    """Return Eq. 1 in nats per token. A segment has one t; token i is masked when its uniform number is below p."""
    total, start = 0.0, 0
    for length, t in zip(lengths, times, strict=True):
        p = (1 - epsilon) * t + epsilon
        segment = ids[start : start + length]
        masked = [uniforms[start + i] < p for i in range(length)]
        start += length
        if not any(masked):
            continue
        noisy = [model.config.mask_token_id if m else x for x, m in zip(segment, masked, strict=True)]
        log_p = logits_of(model, noisy).log_softmax(-1)
        for i in range(length):
            if masked[i]:
                total += -float(log_p[i, segment[i]]) / p
    return total / len(ids)


def reference_bell(t):
    """Return density and distribution function at t of the bell: normal around 1/2, deviation 0.2, cut at 0 and 1."""
    below, at, above = (0.5 * (1 + math.erf((x - 0.5) / 0.2 / math.sqrt(2))) for x in (0, t, 1))
    normal = math.exp(-0.5 * ((t - 0.5) / 0.2) ** 2) / (0.2 * math.sqrt(2 * math.pi))
    return normal / (above - below), (at - below) / (above - below)


def reference_time(u, bell):
    """Return the t below which a share u of all t lies."""
    low, high = 0.0, 1.0
    for _ in range(60 if bell else 0):
        middle = (low + high) / 2
        low, high = (middle, high) if reference_bell(middle)[1] < u else (low, middle)
    return low if bell else u


def reference_training_loss(model, ids, lengths, strata, uniforms, noise):
    """Return the loss of training with other noise: Eq. 1 over segments and, if there are any, their complements."""
    total, start, (low, high) = 0.0, 0, noise.band
    views = 2 if noise.complementary else 1
    for length, stratum in zip(lengths, strata, strict=True):
        t = reference_time(stratum, noise.bell)
        segment, first = ids[start : start + length], start
        start += length
        for view in range(views):
            p = low + (high - low) * t
            masked = [(uniforms[first + i] < p) == (view == 0) for i in range(length)]
            p = p if view == 0 else 1 - p
            density = reference_bell(t)[0] if noise.bell else 1
            mean = 0.5 if views == 2 else (low + high) / 2
            noisy = [model.config.mask_token_id if m else x for x, m in zip(segment, masked, strict=True)]
            log_p = logits_of(model, noisy).log_softmax(-1)
            entropy = -sum(float(log_p[i, segment[i]]) for i in range(length) if masked[i])
            total += entropy / {"1/p": p, "bound": p * density, "none": mean}[noise.weight]
    return total / (views * len(ids))


def reference_generate(model, prompt, settings, think=()):
    """Answer one prompt as spec §5 says, without stop strings.

    Returns (ids, finish reason, forwards, log-probabilities).
    """
    s, mask, block = settings, model.config.mask_token_id, settings.block_length
    budget = min(s.max_new_tokens, model.config.max_position_embeddings - len(prompt)) // block * block
    steps = s.steps_per_block or block
    answer = [None] * budget  # None is a masked position
    log_probs = [None] * budget
    forwards = answer_step = 0
    pasts = [[None] * model.config.num_hidden_layers for _ in range(2)]
    doubt, needed = False, None
    for start in range(0, budget, block):
        positions = range(start, start + block)
        view = budget if s.later_masks else start + block
        block_step = 0
        while any(answer[i] is None for i in positions):
            seen = [mask if x is None else x for x in answer[:view]]
            if s.cache == "none":
                first = 0
            else:
                # A pass computes everything if it is the first of a block ("prefix", "dual") or of the answer, or
                # follows a doubt ("adaptive"); the finished block once more if it is the first of the next block;
                # otherwise the positions from the active block on, under "dual" those of the active block alone.
                first = len(prompt) + start
                if block_step == 0:
                    first = 0 if s.cache in ("prefix", "dual") or start == 0 else first - block
                if doubt:
                    first = 0
            last = len(prompt) + (start + block if s.cache == "dual" and block_step else view)

            def passed(given, past, seen=seen, first=first, last=last):
                if s.cache == "none":
                    return logits_of(model, given + seen)[len(prompt) :]
                computed = logits_with_past(model, given + seen, first, past, last)
                rows = torch.zeros(len(given) + len(seen), computed.shape[-1], dtype=torch.float64)
                rows[first:last] = computed
                return rows[len(given) :]

            logits = passed(list(prompt), pasts[0])
            forwards += 1
            if s.guidance_scale:
                free = passed([mask] * len(prompt), pasts[1])
                logits = free + (s.guidance_scale + 1) * (logits - free)
                forwards += 1
            opened = [i for i in positions if answer[i] is None]
            for v in {*prompt, *answer} - {None}:
                for i in opened:
                    logits[i, v] *= s.repetition_penalty if logits[i, v] < 0 else 1 / s.repetition_penalty
            for v in range(logits.shape[-1]):
                count = sum(x == v for x in answer)
                logits[opened, v] -= s.presence_penalty * (count > 0) + s.frequency_penalty * count
                logits[opened, v] += (s.logit_bias or {}).get(v, 0.0)
            if s.think_boost and not contains(answer, think):
                at = opened[0]
                for n in range(len(think)):
                    if n <= at and answer[at - n : at] == list(think[:n]):
                        following = think[n]  # the longest prefix wins: n rises
                logits[at, following] += s.think_boost * min(1, (at + 1) / budget) ** s.think_boost_power
            proposal, confidence, order = {}, {}, {}
            for i in opened:
                choice = logits[i].clone()
                choice[mask] = -math.inf
                probability = logits[i].softmax(-1)
                best, second = sorted((float(probability[v]) for v in range(len(choice)) if v != mask), reverse=True)[
                    :2
                ]
                entropy = -sum(float(p * p.log()) for p in choice.softmax(-1) if p > 0)
                if s.temperature:
                    kept = reference_kept(choice / s.temperature, s.top_k, s.top_p, s.min_p)
                    for v in range(len(choice)):
                        u = reference_uniform(s.seed, GUMBEL, answer_step, i, v)
                        choice[v] -= s.temperature * math.log(-math.log(u)) if v in kept else math.inf
                proposal[i] = int(choice.argmax())
                confidence[i] = float(probability[proposal[i]])
                if s.entropy_bound is not None:
                    order[i] = entropy
                elif s.remasking == "random":
                    order[i] = -reference_uniform(s.seed, REMASK, answer_step, i)
                elif s.remasking == "margin":
                    order[i] = second - best
                else:
                    order[i] = -confidence[i]
            ranked = sorted(opened, key=lambda i: (order[i], i))
            if s.threshold is not None:
                count = max(1, sum(c >= s.threshold for c in confidence.values()))
            elif s.entropy_bound is not None:
                sums = [[order[i] for i in ranked[:n]] for n in range(1, len(ranked) + 1)]
                count = sum(math.fsum(x) - max(x) <= s.entropy_bound for x in sums)
            else:
                count = block // steps + (1 if block_step < block % steps else 0)
            for i in ranked[:count]:
                answer[i] = proposal[i]
                log_probs[i] = math.log(confidence[i])
            doubt = s.cache == "adaptive" and min(confidence[i] for i in ranked[:count]) < s.refresh_below
            block_step += 1
            answer_step += 1
            # Once every token before an EOS is known, the rest of the block changes nothing: later passes do not count.
            if needed is None and any(answer[i] in s.eos_ids and None not in answer[:i] for i in positions):
                needed = forwards
        for i in positions:
            if answer[i] in s.eos_ids:
                return answer[:i], "stop", needed, log_probs[:i]
    return answer, "length", forwards, log_probs


def reference_kept(logits, top_k, top_p, min_p=0.0):
    """Return the ids left to draw from: the k best and those tied with them, if better ids have less than top_p.

    Of them, those with at least min_p times the probability of the best.
    """
    best = sorted(logits.tolist(), reverse=True)[:top_k]
    weights = [math.exp(x - best[0]) for x in best]
    if top_p < 1:
        best = [x for n, x in enumerate(best) if sum(weights[:n]) < top_p * sum(weights)]
    return {v for v in range(len(logits)) if logits[v] >= best[-1] and math.exp(logits[v] - best[0]) >= min_p}


def reference_infill(model, template, settings):
    """Fill slots (None) greedily: one a forward pass, evenly many in a number of steps, or all above the threshold.

    Returns (ids, forwards); guidance is against a template whose fixed tokens are masked.
    """
    mask, filled, forwards, step = model.config.mask_token_id, list(template), 0, 0
    slots = [i for i, x in enumerate(template) if x is None]
    steps = min(settings.steps_per_block or len(slots), len(slots))
    while None in filled:
        seen = [mask if x is None else x for x in filled]
        logits = logits_of(model, seen)
        forwards += 1
        if settings.guidance_scale:
            free = logits_of(model, [x if i in slots else mask for i, x in enumerate(seen)])
            logits = free + (settings.guidance_scale + 1) * (logits - free)
            forwards += 1
        sure = {}
        for i in slots:
            if filled[i] is None:
                choice = logits[i].clone()
                choice[mask] = -math.inf
                sure[i] = (float(logits[i].softmax(-1)[choice.argmax()]), int(choice.argmax()))
        ranked = sorted(sure, key=lambda i: (-sure[i][0], i))
        count = len(slots) // steps + (step < len(slots) % steps)
        if settings.threshold is not None:
            count = max(1, sum(confidence >= settings.threshold for confidence, _ in sure.values()))
        for i in ranked[:count]:
            filled[i] = sure[i][1]
        step += 1
    return filled, forwards


def reference_causal_loss(model, ids, lengths):
    """Return the next-token loss in nats per predicted token; segments do not see each other."""
    terms, start = [], 0
    for length in lengths:
        segment = ids[start : start + length]
        start += length
        log_p = logits_of(model, segment).log_softmax(-1)
        terms += [-float(log_p[i, segment[i + 1]]) for i in range(length - 1)]
    return sum(terms) / len(terms)


def reference_causal_score(model, context, candidate):
    """Return log p(candidate | context), and whether each of its tokens is the most probable one."""
    log_p = log_p_of(model, [*context, *candidate])[len(context) - 1 : -1]
    return sum(float(row[x]) for row, x in zip(log_p, candidate, strict=True)), log_p.argmax(-1).tolist() == candidate


def reference_causal_generate(model, prompt, settings):
    """Answer without EOS, each token from a forward pass over all before it. Returns (ids, log-probabilities)."""
    ids, log_probs = [], []
    for i in range(settings.max_new_tokens):
        logits = logits_of(model, [*prompt, *ids])[-1]
        choice = logits.clone()
        choice[model.config.mask_token_id] = -math.inf
        if settings.temperature:
            kept = reference_kept(choice / settings.temperature, settings.top_k, settings.top_p)
            for v in range(len(choice)):
                u = reference_uniform(settings.seed, GUMBEL, i, i, v)
                choice[v] -= settings.temperature * math.log(-math.log(u)) if v in kept else math.inf
        ids.append(int(choice.argmax()))
        log_probs.append(float(logits.log_softmax(-1)[ids[-1]]))
    return ids, log_probs


def contains(answer, sequence):
    return any(answer[i : i + len(sequence)] == list(sequence) for i in range(len(answer) - len(sequence) + 1))


def reference_confidence_score(model, context, candidate, right_context=()):
    """Return S of paper Eq. 2 in nats."""
    mask, score = model.config.mask_token_id, 0.0
    masked = list(range(len(candidate)))
    while masked:
        seen = [mask if i in masked else x for i, x in enumerate(candidate)]
        log_p = log_p_of(model, [*context, *seen, *right_context])
        value = {i: float(log_p[len(context) + i, candidate[i]]) for i in masked}
        best = max(masked, key=lambda i: (value[i], -i))
        score += value[best]
        masked.remove(best)
    return score


def reference_likelihood_score(model, context, candidate, views, right_context=()):
    """Return LLaDA Eq. 6 for known views: masked candidate positions, and the share of their level in the mean."""
    mask, total = model.config.mask_token_id, 0.0
    for masked, share in views:
        seen = [mask if i in masked else x for i, x in enumerate(candidate)]
        log_p = log_p_of(model, [*context, *seen, *right_context])
        one = sum(float(log_p[len(context) + i, candidate[i]]) for i in masked)
        total += share * len(candidate) / len(masked) * one
    return total


def reference_views(length, samples, seed, complementary=False):
    """Return the masked positions and the share of each view: strata of levels, tokens taken in turn.

    The samples, by their levels, belong to as many orders as give each at most eight.

    With complements the strata are even, and what a view leaves visible is masked in another one.
    """
    drawn, power = [], 1 if complementary else 4 / 3
    for i in range(samples):
        low, high = (i / samples) ** power, ((i + 1) / samples) ** power
        count = 1 + math.floor(length * (low + (high - low) * reference_uniform(seed, 18, i)))
        if complementary and count < length:
            count = min(count, length - count)
        drawn.append((count, high - low))
    orders = [
        sorted(range(length), key=lambda place, number=number: reference_uniform(seed, 19, number, place))
        for number in range(math.ceil(samples / 8))
    ]
    views, behind = [], [0] * len(orders)
    for i, (count, share) in enumerate(sorted(drawn, reverse=True)):
        order, number = orders[i % len(orders)], i % len(orders)
        masked = [order[(behind[number] + k) % length] for k in range(count)]
        behind[number] += count
        if complementary and count < length:
            views += [(sorted(masked), share / 2), (sorted({*order} - {*masked}), share / 2)]
        else:
            views.append((sorted(masked), share))
    return views


def reference_path(model, context, candidate, settings, right_context=()):
    """Return sum over k, sum over i in S_k, of log p(x_i | what was visible before step k), and the steps S_k.

    S_k is chosen by the rule of the settings from the distributions at the open positions of the block, never from x.
    A later block does not exist yet, unless something stands behind it.
    """
    s, mask, length, total, paths = settings, model.config.mask_token_id, len(candidate), 0.0, []
    seen = [mask] * length
    for start in range(0, length, s.block_length):
        end = min(start + s.block_length, length)
        steps, number, masked = min(s.steps_per_block or s.block_length, end - start), 0, list(range(start, end))
        while masked:
            view = [*seen, *right_context] if right_context or s.later_masks else seen[:end]
            logits = logits_of(model, [*context, *view])[len(context) :]
            order = {}
            for i in masked:
                best, second = sorted(p for v, p in enumerate(logits[i].softmax(-1).tolist()) if v != mask)[:-3:-1]
                tokens = torch.cat((logits[i, :mask], logits[i, mask + 1 :])).softmax(-1)
                order[i] = second - best if s.remasking == "margin" else -best
                if s.entropy_bound is not None:
                    order[i] = -float((tokens * tokens.log()).sum())
            ranked = sorted(masked, key=lambda i: (order[i], i))
            count = (end - start) // steps + (number < (end - start) % steps)
            if s.threshold is not None:
                count = max(1, sum(-x >= s.threshold for x in order.values()))
            if s.entropy_bound is not None:
                count = sum(sum(order[i] for i in ranked[:n]) <= s.entropy_bound for n in range(len(ranked)))
            log_p = log_p_of(model, [*context, *view])[len(context) :]
            paths.append(sorted(ranked[:count]))
            total += sum(float(log_p[i, candidate[i]]) for i in paths[-1])
            for i in paths[-1]:
                seen[i] = candidate[i]
                masked.remove(i)
            number += 1
    return total, paths


def reference_bound(model, context, answer, samples, seed, complementary=False):
    """Return the bound B(answer | context) under the views of a seed."""
    return reference_likelihood_score(
        model, context, answer, reference_views(len(answer), samples, seed, complementary)
    )


def reference_preference(bounds, reference, lengths, beta, normalise=False, anchor=0.0):
    """Return the mean over pairs of -log σ(β (gap of chosen - gap of rejected)) - anchor B(chosen) / L.

    Chosen and rejected alternate.
    """
    gaps = [(b - r) / (n if normalise else 1) for b, r, n in zip(bounds, reference, lengths, strict=True)]
    margins = [beta * (gaps[i] - gaps[i + 1]) for i in range(0, len(gaps), 2)]
    chosen = [anchor * b / n for b, n in zip(bounds[0::2], lengths[0::2], strict=True)]
    return sum(math.log1p(math.exp(-m)) - c for m, c in zip(margins, chosen, strict=True)) / len(margins)


def reference_policy(method, new, old, start, advantage, lengths, epsilon, beta, psi):
    """Return the mean loss of answers (espo, gdsd), or of their tokens (diffu-grpo), see `illada.post_training.policy`.

    `new`, `old` and `start` are sums of log-probabilities; for diffu-grpo lists of log-probabilities of each token.
    """
    total = 0.0

    def surrogate(ratio, a):
        return -min(ratio * a, max(1 - epsilon, min(1 + epsilon, ratio)) * a)

    for now, before, first, a, n in zip(new, old, start, advantage, lengths, strict=True):
        if method == "gdsd":
            total += (max(-epsilon, min(epsilon, (now - before) / n)) - psi * a) ** 2
        elif method == "espo":
            total += surrogate(math.exp((now - before) / n), a) + beta * (now - first) ** 2 / (2 * n)
        else:
            for x, y, z in zip(now, before, first, strict=True):
                total += surrogate(math.exp(x - y), a) + beta * (math.exp(z - x) - (z - x) - 1)
    return total / (sum(lengths) if method == "diffu-grpo" else len(lengths))


def reference_certainty(views, entropy_weight, temperature):
    """Return the loss of an answer, the sum over its views, each logits and ids of what is asked for (dParallel)."""
    total = 0.0
    for logits, ids in views:
        entropies = []
        for row, target in zip(logits, ids, strict=True):
            log_p = [float(x) for x in torch.log_softmax(row.double(), 0)]
            total += -log_p[target] / len(ids)
            if log_p[target] == max(log_p):
                q = [math.exp(x / temperature) for x in log_p]
                q = [x / sum(q) for x in q]
                entropies.append(-sum(x * math.log(x) for x in q if x))
        total += entropy_weight * sum(entropies) / max(1, len(entropies))
    return total


def reference_fillings(log_p, decided, matches, end):
    """Yield what an answer may be with its log-probability: every way to fill in what is not decided.

    Args:
        log_p: of each id at each position, as lists.
        decided: an id for each position, or None.
        matches: whether ids, up to the first end and without it, are an answer.
        end: the id that ends an answer; what stands behind it does not matter.
    """
    choices = [range(len(row)) if one is None else [one] for row, one in zip(log_p, decided, strict=True)]
    for ids in itertools.product(*choices):
        if matches(ids[: ids.index(end)] if end in ids else ids):
            yield ids, sum(row[one] for row, one, at in zip(log_p, ids, decided, strict=True) if at is None)
