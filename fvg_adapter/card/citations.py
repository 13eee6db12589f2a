"""What to cite: the paper of FVG-PT and that of each tuner."""

from __future__ import annotations

FVG_PT = """@article{li2026fvgpt,
  title   = {{FVG-PT}: Adaptive Foreground View-Guided Prompt Tuning for Vision-Language Models},
  author  = {Li and Wang and Zhou and Sun and Jiang and Wang and Long and Peng},
  journal = {arXiv preprint arXiv:2603.08708},
  year    = {2026}
}"""

CLIP = """@inproceedings{radford2021clip,
  title     = {Learning Transferable Visual Models From Natural Language Supervision},
  author    = {Radford, Alec and Kim, Jong Wook and Hallacy, Chris and others},
  booktitle = {International Conference on Machine Learning (ICML)},
  year      = {2021}
}"""

BY_TUNER: dict[str, tuple[str, str]] = {
    "zero_shot": ("CLIP", CLIP),
    "coop": (
        "CoOp",
        """@article{zhou2022coop,
  title   = {Learning to Prompt for Vision-Language Models},
  author  = {Zhou, Kaiyang and Yang, Jingkang and Loy, Chen Change and Liu, Ziwei},
  journal = {International Journal of Computer Vision (IJCV)},
  year    = {2022}
}""",
    ),
    "kgcoop": (
        "KgCoOp",
        """@inproceedings{yao2023kgcoop,
  title     = {Visual-Language Prompt Tuning with Knowledge-Guided Context Optimization},
  author    = {Yao, Hantao and Zhang, Rui and Xu, Changsheng},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2023}
}""",
    ),
    "promptsrc": (
        "PromptSRC",
        """@inproceedings{khattak2023promptsrc,
  title     = {Self-regulating Prompts: Foundational Model Adaptation without Forgetting},
  author    = {Khattak, Muhammad Uzair and Wasim, Syed Talal and Naseer, Muzammal and Khan, Salman and Yang,
               Ming-Hsuan and Khan, Fahad Shahbaz},
  booktitle = {IEEE/CVF International Conference on Computer Vision (ICCV)},
  year      = {2023}
}""",
    ),
    "mmrl": (
        "MMRL",
        """@inproceedings{guo2025mmrl,
  title     = {{MMRL}: Multi-Modal Representation Learning for Vision-Language Models},
  author    = {Guo, Yuncheng and Gu, Xiaodong},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2025}
}""",
    ),
    "lora": (
        "LoRA",
        """@inproceedings{hu2022lora,
  title     = {{LoRA}: Low-Rank Adaptation of Large Language Models},
  author    = {Hu, Edward J. and Shen, Yelong and Wallis, Phillip and others},
  booktitle = {International Conference on Learning Representations (ICLR)},
  year      = {2022}
}

@inproceedings{zanella2024cliplora,
  title     = {Low-Rank Few-Shot Adaptation of Vision-Language Models},
  author    = {Zanella, Maxime and Ben Ayed, Ismail},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR) Workshops},
  year      = {2024}
}""",
    ),
}
"""Name and reference of each tuner of ours, by `Tuner.kind`."""


def tuner_name(kind: str) -> str:
    """What people call a tuner: "CoOp" for "coop", "plain CLIP" for "zero_shot", its kind where we do not know it."""
    return "plain CLIP" if kind == "zero_shot" else BY_TUNER[kind][0] if kind in BY_TUNER else kind


def references(kind: str, heads: bool) -> str:
    """BibTeX of what an adapter builds on."""
    found = [FVG_PT] if heads else []
    if kind in BY_TUNER:
        found.append(BY_TUNER[kind][1])
    return "\n\n".join(found)
