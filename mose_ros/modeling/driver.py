"""The whole network: language model with views, view router and action expert; its losses, and its plan in plain PyTorch.

`plan` is the reference that exported bundles are held to; it is no engine.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from safetensors.torch import load_file, save_file
from torch import nn

from mose_ros.core.action import flow
from mose_ros.core.files import folder_beside
from mose_ros.modeling.action_expert import ActionExpert
from mose_ros.modeling.batch import Batch, LossWeights
from mose_ros.modeling.config import DriverConfig
from mose_ros.modeling.losses import accuracy, focal, load_balance, soft_cross_entropy
from mose_ros.modeling.mose import Decoded, MoseQwen2VL
from mose_ros.modeling.qwen2vl import hf_config
from mose_ros.modeling.view_router import ViewRouter, draw_view

Tensor = torch.Tensor
CONFIG, VLM, WEIGHTS = 'driver.json', 'vlm', 'driver.safetensors'


@dataclass(frozen=True, kw_only=True)
class Output:
    """What one training step gives; losses unweighted by name, measures (accuracies, token accuracy) by name."""

    loss: Float[Tensor, '']
    parts: Mapping[str, Float[Tensor, '']]
    metrics: Mapping[str, Float[Tensor, '']]


@dataclass(frozen=True, kw_only=True)
class PlanOutput:
    """What the reference answers for one moment."""

    action: Float[Tensor, 'H 2']  # normalised
    logits: Float[Tensor, 'vocab']  # of the first token of the answer
    skills: tuple[int, ...]  # expert on each level; zeros where no skill is chosen
    skill_scores: Sequence[Float[Tensor, 'E']]
    action_skill: int  # of the last step; all steps' but with action.routing 'token'
    action_scores: Float[Tensor, 'A']
    answer: tuple[int, ...]  # tokens, without the end token


class MoseDriver(nn.Module):
    """A MoSE that drives."""

    def __init__(self, config: DriverConfig, vlm: MoseQwen2VL | None = None):
        super().__init__()
        self.config = config
        if vlm is None:
            vlm = MoseQwen2VL(hf_config(config.vision, config.decoder, config.mose))
            vlm.copy_shared()
        self.vlm = vlm
        self.view_router = ViewRouter(config.glance, len(config.cameras), config.proprio)
        self.action_expert = ActionExpert(config.action, config.decoder, config.proprio)
        for layer in self.action_expert.layers:
            layer.mlp.copy_shared()
        if config.semantic_classes:
            self.semantic_head = nn.Linear(config.vision.width, config.semantic_classes)

    def forward(
        self, batch: Batch, losses: LossWeights | None = None, teacher_forcing: float = 1.0
    ) -> Output:
        """Return the losses of a batch.

        teacher_forcing: the share of samples whose experts are those of their labels; the rest take their routers'.
        Parts: text, routers, flow, action_router, view_router, semantics, balance; a part of weight 0, or of something
        that the network does not have, is not computed.
        """
        losses = losses or LossWeights()
        parts, metrics = {}, {}
        views = None
        if losses.view_router or batch.choices is not None:
            views = self.view_router(batch.thumbnails, batch.present, batch.proprio).float()
            views = views.masked_fill(batch.present == 0, -1e4)
        if losses.view_router:
            counts = losses.camera_counts
            parts['view_router'] = focal(views, batch.camera, losses.gamma, counts)
            metrics['router_view'] = accuracy(views, batch.camera)
        language = losses.text or losses.routers or losses.flow or losses.action_router
        if language or losses.semantics:
            batch, features, embeds = self._see(batch, views)
            if losses.semantics and batch.semantics is not None:
                known = batch.semantics.shape[1]
                logits = self.semantic_head(features[:, :known])
                parts['semantics'] = soft_cross_entropy(logits, batch.semantics)
        if language:
            coin = torch.rand_like(batch.proprio[:, 0]) if batch.coin is None else batch.coin
            known = coin[:, None] < teacher_forcing
            decoded = self._read(batch, embeds, torch.where(known, batch.skills, -1), losses)
            self._language_losses(batch, decoded, losses, parts, metrics)
            if losses.flow or losses.action_router:
                forced = torch.where(known[:, 0], batch.action_skill, -1)
                self._action_losses(batch, decoded, forced, losses, parts, metrics)
        if not parts:
            raise ValueError('all loss weights are 0; nothing is left to train')
        loss = sum(getattr(losses, name) * part for name, part in parts.items())
        return Output(loss=loss, parts=parts, metrics=metrics)

    def _see(
        self, batch: Batch, views: Float[Tensor, 'B C'] | None
    ) -> tuple[Batch, Float[Tensor, 'B V N W'], Float[Tensor, 'B V n D']]:
        """Return the batch with the features and the tokens of its views.

        With choices the last view is drawn by the router's scores, and the losses teach the router through what they
        would make of the others: so all are looked at, as DriveMoE does in its second stage.
        """
        choices, patches = batch.choices, batch.patches
        if choices is not None:
            patches = torch.cat([patches[:, :-1], choices.patches], 1)
        features, embeds = (
            seen.unflatten(0, patches.shape[:2]) for seen in self.vlm.see(patches.flatten(0, 1))
        )
        if choices is None:
            return batch, features, embeds
        fixed = batch.patches.shape[1] - 1
        drawn = draw_view(views[:, choices.places], choices.noise)
        last = torch.einsum('bk,bknd->bnd', drawn.to(embeds.dtype), embeds[:, fixed:])
        batch = replace(batch, choices=None, **choices.text(drawn.argmax(-1)))
        if batch.semantics is not None:  # of the labelled view, which may be another
            batch = replace(batch, semantics=batch.semantics[:, :fixed])
        return batch, features, torch.cat([embeds[:, :fixed], last[:, None]], 1)

    def _read(self, batch: Batch, embeds: Tensor, forced: Tensor, losses: LossWeights) -> Decoded:
        """Run the decoder; without a text loss over the prompts alone."""
        place = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)
        prompt_mask = (place < batch.prompt_lengths[:, None]).float()
        end = len(place) if losses.text else int(batch.prompt_lengths.max())
        return self.vlm.read(
            batch.input_ids[:, :end],
            embeds,
            batch.position_ids[..., :end],
            prompt_mask[:, :end],
            forced=forced,
        )

    def _language_losses(self, batch, decoded, losses, parts, metrics):
        if losses.text:
            target = batch.labels[:, 1:]
            counts = target >= 0
            logits = self.vlm.lm_head(decoded.hidden[:, :-1][counts]).float()
            target = target[counts]
            parts['text'] = F.cross_entropy(logits, target)
            metrics['token_accuracy'] = (logits.argmax(-1) == target).float().mean()
        if losses.balance and decoded.gates:
            is_token = batch.attention_mask[:, : decoded.hidden.shape[1]]
            balances = [load_balance(gates, is_token) for gates in decoded.gates]
            parts['balance'] = sum(balances) / len(balances)
        if losses.routers and self.vlm.router_levels:
            levels = self.vlm.router_levels
            targets = [batch.skills[:, level] for level in levels]
            parts['routers'] = sum(
                F.cross_entropy(scores, target, ignore_index=-1, reduction='sum')
                for scores, target in zip(decoded.scores, targets, strict=True)
            ) / sum((target >= 0).sum() for target in targets).clamp(min=1)
        names = list(self.config.mose.levels)
        for scores, level in zip(decoded.scores, self.vlm.router_levels, strict=True):
            name = f'router_{names[level]}'
            metrics.setdefault(name, accuracy(scores, batch.skills[:, level]))

    def _action_losses(self, batch, decoded, forced, losses, parts, metrics):
        expert = self.action_expert
        end = int(batch.prompt_lengths.max())
        prompt = [
            (k[:, :, :end], v[:, :, :end])
            for k, v in zip(decoded.keys, decoded.values, strict=True)
        ]
        if expert.config.knowledge_insulation:
            prompt = [(k.detach(), v.detach()) for k, v in prompt]
        mask = torch.arange(end, device=forced.device) < batch.prompt_lengths[:, None]
        noisy, t, velocity = expert.draw(batch.action, batch.moments, batch.noise)
        answer = expert(noisy, t, batch.proprio, prompt, mask, forced)
        parts['flow'] = (answer.velocity.float() - velocity).square().mean()
        if not expert.config.moe_layers:
            return
        parts['action_router'] = focal(
            answer.scores, batch.action_skill, losses.gamma, losses.action_skill_counts
        )
        metrics['router_action'] = accuracy(answer.scores, batch.action_skill)

    @torch.no_grad()
    def plan(
        self,
        patches: Float[Tensor, 'V N D'],
        input_ids: Int64[Tensor, 'T'],
        position_ids: Int64[Tensor, '3 T'],
        proprio: Float[Tensor, 'P'],
        noise: Float[Tensor, 'H 2'],
        *,
        num_steps: int,
        max_new_tokens: int = 0,
        end_id: int = -1,
        skill_override: Sequence[int] | None = None,
        action_override: int = -1,
    ) -> PlanOutput:
        """Answer one moment as the engine does: prefill, the flow from its cache, then the greedy answer."""
        _, embeds = self.vlm.see(patches)
        device = patches.device
        forced = None if skill_override is None else torch.tensor([skill_override], device=device)
        first = self.vlm.read(
            input_ids[None],
            embeds[None],
            position_ids[:, None],
            torch.ones(1, len(input_ids), device=device),
            forced=forced,
        )
        cache = list(zip(first.keys, first.values, strict=True))
        everyone = torch.ones(1, len(input_ids), dtype=torch.bool, device=device)
        wish = torch.tensor([action_override], device=device)
        decisions = []

        def velocity(x, t):
            time = torch.full((1, 1), float(t), device=device)
            answer = self.action_expert(x[None, None], time, proprio[None], cache, everyone, wish)
            decisions.append(answer)
            return answer.velocity[0, 0]

        action = flow(velocity, noise, num_steps)
        logits = self.vlm.lm_head(first.hidden[0, -1])
        return PlanOutput(
            action=action,
            logits=logits,
            skills=tuple(first.skills[0].tolist()),
            skill_scores=[scores[0] for scores in first.scores],
            action_skill=int(decisions[-1].skill),
            action_scores=decisions[-1].scores[0],
            answer=self._decode(
                logits, cache, first.skills, int(position_ids.max()) + 1, max_new_tokens, end_id
            ),
        )

    def _decode(self, logits, cache, skills, position, max_new_tokens, end_id) -> tuple[int, ...]:
        answer = []
        while len(answer) < max_new_tokens and (token := int(logits.argmax())) != end_id:
            answer.append(token)
            hidden = self.vlm.model.language_model.embed_tokens(skills.new_tensor([[token]]))
            place = skills.new_full((3, 1, 1), position + len(answer) - 1)
            step = self.vlm(hidden, place, skills=skills, past=cache)
            new = zip(step.keys, step.values, strict=True)
            cache = [
                (torch.cat([k, new_k], 2), torch.cat([v, new_v], 2))
                for (k, v), (new_k, new_v) in zip(cache, new, strict=True)
            ]
            logits = self.vlm.lm_head(step.hidden[0, -1])
        return tuple(answer)

    def save(self, folder: str | Path) -> None:
        """Write configuration and weights: the language model in Hugging Face's format, the rest as safetensors.

        Written beside and renamed: the folder is a whole checkpoint or it is not there.
        """
        with folder_beside(folder) as partial:
            self.vlm.save_pretrained(partial / VLM)
            self.save_rest(partial)

    def save_rest(self, folder: Path) -> None:
        """Write all but the language model into a folder."""
        rest = {
            name: value.contiguous()
            for name, value in self.state_dict().items()
            if not name.startswith('vlm.')
        }
        save_file(rest, folder / WEIGHTS)
        (folder / CONFIG).write_text(self.config.to_json() + '\n', encoding='utf-8')

    @classmethod
    def load(cls, folder: str | Path, config: DriverConfig | None = None) -> 'MoseDriver':
        """Undo `save`; ValueError when the folder is no checkpoint.

        config: the folder's own with other values where no weight and nothing of the language model depends on them.
        """
        folder = Path(folder)
        config = config or read_config(folder)
        vlm, found = MoseQwen2VL.from_pretrained(
            folder / VLM, dtype=torch.float32, output_loading_info=True
        )
        if lost := [*found['missing_keys'], *found['mismatched_keys']]:
            raise ValueError(f'{folder / VLM} lacks {len(lost)} weights, as {lost[0]}')
        driver = cls(config, vlm)
        missing, foreign = driver.load_state_dict(load_file(folder / WEIGHTS), strict=False)
        missing = [name for name in missing if not name.startswith('vlm.')]
        if missing or foreign:
            raise ValueError(f'{folder / WEIGHTS} lacks {missing} and has unknown {foreign}')
        return driver

    def train_only(self, what: str) -> None:
        """Let only these parameters move: 'all', or words and prefixes of parameters' names, comma-separated.

        The words: 'routers', the skill routers; 'experts', the FFNs of the MoSE blocks, shared and skilled (of a baseline:
        the plain FFNs, or the token mixtures with their routers, in the same layers); 'mose', both.
        ViT, attention, norms, embeddings and plain FFNs are then frozen (MoSE, "Skill Centric Routing Mechanism").
        ValueError when nothing is called so.
        """
        routers = ['vlm.routers.']
        layers = self.vlm.mose_layers
        experts = [f'vlm.model.language_model.layers.{layer}.mlp.' for layer in layers]
        words = {'all': [''], 'routers': routers, 'experts': experts, 'mose': routers + experts}
        names = [one.strip() for one in what.split(',')]
        wanted = {name: tuple(words.get(name, [name])) for name in names}
        for name, prefixes in wanted.items():
            if not name or not any(n.startswith(prefixes) for n, _ in self.named_parameters()):
                raise ValueError(
                    f'trainable: no parameter begins with {name!r}, nor is it one of {", ".join(words)}'
                )
        prefixes = tuple(prefix for group in wanted.values() for prefix in group)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith(prefixes))

    def count_parameters(self) -> dict[str, int]:
        """Return how many numbers each part holds, and how many of all are used for one plan ('active')."""
        parts = {
            'vision': self.vlm.model.visual,
            'decoder': self.vlm.model.language_model,
            'view_router': self.view_router,
            'action': self.action_expert,
        }
        counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
        total = sum(p.numel() for p in self.parameters())
        idle = 0
        for module in self.modules():
            if experts := getattr(module, 'experts', None):
                size = sum(p.numel() for p in experts[0].parameters())
                active = self.config.action.top_k if module in _mixtures(self.action_expert) else 1
                groups = 2 if module.image_experts else 1
                idle += groups * size * (len(experts) - active)
        return counts | {'total': total, 'active': total - idle}


def read_config(folder: str | Path) -> DriverConfig:
    """Return the configuration of a checkpoint; ValueError when the folder is none."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise ValueError(f'{folder} is no checkpoint: it has no {CONFIG}')
    return DriverConfig.from_json(path.read_text(encoding='utf-8'))


def _mixtures(module: nn.Module) -> list[nn.Module]:
    return [one for one in module.modules() if getattr(one, 'experts', None)]
