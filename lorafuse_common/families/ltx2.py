"""LTX-2: LTX-Video's blocks, a second stream of them for sound, and attention between the two."""

from lorafuse_common.naming import Family, Layout, Size, names, parts

_ATTENTIONS = ("attn1", "attn2", "audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")

_ADALN = {
    "adaln_single": "time_embed",
    "audio_adaln_single": "audio_time_embed",
    "prompt_adaln_single": "prompt_adaln",
    "audio_prompt_adaln_single": "audio_prompt_adaln",
    "av_ca_video_scale_shift_adaln_single": "av_cross_attn_video_scale_shift",
    "av_ca_audio_scale_shift_adaln_single": "av_cross_attn_audio_scale_shift",
    "av_ca_a2v_gate_adaln_single": "av_cross_attn_video_a2v_gate",
    "av_ca_v2a_gate_adaln_single": "av_cross_attn_audio_v2a_gate",
}

_SAME = (
    "caption_projection.linear_1",
    "caption_projection.linear_2",
    "audio_caption_projection.linear_1",
    "audio_caption_projection.linear_2",
    *(
        f"transformer_blocks.{{}}.{attention}.{name}"
        for attention in _ATTENTIONS
        for name in ("to_q", "to_k", "to_v", "to_out.0", "to_gate_logits")
    ),
    "transformer_blocks.{}.ff.net.0.proj",
    "transformer_blocks.{}.ff.net.2",
    "transformer_blocks.{}.audio_ff.net.0.proj",
    "transformer_blocks.{}.audio_ff.net.2",
    "transformer_blocks.{}.scale_shift_table",
    "transformer_blocks.{}.audio_scale_shift_table",
    "transformer_blocks.{}.prompt_scale_shift_table",
    "transformer_blocks.{}.audio_prompt_scale_shift_table",
    "proj_out",
    "audio_proj_out",
    "scale_shift_table",
    "audio_scale_shift_table",
)

_RENAMED = {
    "patchify_proj": "proj_in",
    "audio_patchify_proj": "audio_proj_in",
    **{
        f"{original}.{linear}": f"{name}.{linear}"
        for original, name in _ADALN.items()
        for linear in ("emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2", "linear")
    },
    **{
        f"transformer_blocks.{{}}.{attention}.{x}_norm": f"transformer_blocks.{{}}.{attention}.norm_{x}"
        for attention in _ATTENTIONS
        for x in "qk"
    },
    **{
        f"transformer_blocks.{{}}.scale_shift_table_a2v_ca_{stream}": (
            f"transformer_blocks.{{}}.{stream}_a2v_cross_attn_scale_shift_table"
        )
        for stream in ("video", "audio")
    },
}

DIFFUSERS = Layout("diffusers", names(*_SAME, *_RENAMED.values()))

ORIGINAL = Layout("original", names(*_SAME) | {original: parts(name) for original, name in _RENAMED.items()})

LTX2 = Family(
    name="ltx2",
    title="LTX-2",
    transformer_classes=("LTX2VideoTransformer3DModel",),
    layouts=(DIFFUSERS, ORIGINAL),
    sizes=(Size(4096, 48, "19B"), Size(2048, 48, "19B")),
)
