# SPDX-License-Identifier: Apache-2.0
"""The public names of NATTEN, by module and by the versions that had them, and those of them that the stand-in has not.

Read from the sources of 0.14.1 to 0.21.7: what each file defines, and in ``natten``, ``natten.functional`` and
``natten.utils``, from which clients import, also what they import from the others. Without the files of kernels, of tests
and of tools.
"""

from __future__ import annotations

NAMES = {
    "natten": {
        "0.14.1 to 0.14.4": "NeighborhoodAttention",
        "0.14.1 to 0.21.7": "NeighborhoodAttention1D NeighborhoodAttention2D __version__",
        "0.15.0 to 0.21.7": "NeighborhoodAttention3D",
        "0.15.0 to 0.17.5": (
            "disable_gemm_na disable_tf32 disable_tiled_na enable_gemm_na enable_tf32 enable_tiled_na has_bfloat "
            "has_cuda has_fp32_gemm has_fp64_gemm has_gemm has_half has_tf32_gemm"
        ),
        "0.17.0 to 0.21.7": (
            "are_deterministic_algorithms_enabled get_memory_usage_preference is_kv_parallelism_in_fused_na_enabled "
            "is_memory_usage_default is_memory_usage_strict is_memory_usage_unrestricted set_memory_usage_preference "
            "use_deterministic_algorithms use_kv_parallelism_in_fused_na"
        ),
        "0.17.0 to 0.17.5": (
            "disable_autotuner has_fna has_fused_na is_autotuner_enabled is_autotuner_enabled_for_backward "
            "is_autotuner_enabled_for_forward is_autotuner_thorough_for_backward is_autotuner_thorough_for_forward "
            "is_fna_enabled is_fused_na_enabled is_gemm_na_enabled is_tf32_in_gemm_na_enabled is_tiled_na_enabled "
            "use_autotuner use_fna use_fused_na use_gemm_na use_tf32_in_gemm_na use_tiled_na"
        ),
        "0.17.5": "force_flex_attention use_flex_attention",
        "0.20.0 to 0.21.7": (
            "HAS_LIBNATTEN allow_flex_compile allow_flex_compile_backprop attention disable_flex_compile "
            "disable_flex_compile_backprop get_bwd_configs_for_cutlass_fmha get_bwd_configs_for_cutlass_fna "
            "get_configs_for_cutlass_blackwell_fmha get_configs_for_cutlass_blackwell_fna get_configs_for_cutlass_fmha "
            "get_configs_for_cutlass_fna get_configs_for_cutlass_hopper_fmha get_configs_for_cutlass_hopper_fna "
            "get_configs_for_flex_fmha get_configs_for_flex_fna is_flex_compile_allowed "
            "is_flex_compile_backprop_allowed merge_attentions na1d na2d na3d"
        ),
        "0.21.0 to 0.21.7": (
            "get_bwd_configs_for_cutlass_blackwell_fmha get_bwd_configs_for_cutlass_blackwell_fna "
            "get_bwd_configs_for_cutlass_hopper_fmha get_bwd_configs_for_cutlass_hopper_fna"
        ),
    },
    "natten.attn_merge": {
        "0.20.0 to 0.21.1": "maybe_torch_compile merge_attentions_compile merge_attentions_fn",
        "0.21.5 to 0.21.7": "MergeAttentionsAutogradFn amp_bwd amp_fwd merge_attentions",
    },
    "natten.context": {
        "0.17.0 to 0.17.5": (
            "AutotunerContext disable_autotuner disable_gemm_na disable_tf32 disable_tiled_na enable_gemm_na "
            "enable_tf32 enable_tiled_na has_bfloat has_cuda has_fna has_fp32_gemm has_fp64_gemm has_fused_na has_gemm "
            "has_half has_tf32_gemm is_autotuner_enabled is_autotuner_enabled_for_backward "
            "is_autotuner_enabled_for_forward is_autotuner_thorough_for_backward is_autotuner_thorough_for_forward "
            "is_fna_enabled is_fused_na_enabled is_gemm_na_enabled is_tf32_in_gemm_na_enabled is_tiled_na_enabled "
            "use_autotuner use_fna use_fused_na use_gemm_na use_tf32_in_gemm_na use_tiled_na"
        ),
        "0.17.0 to 0.21.7": (
            "MemoryUsagePreference NattenContext are_deterministic_algorithms_enabled get_memory_usage_preference "
            "is_kv_parallelism_in_fused_na_enabled is_memory_usage_default is_memory_usage_strict "
            "is_memory_usage_unrestricted set_memory_usage_preference use_deterministic_algorithms "
            "use_kv_parallelism_in_fused_na"
        ),
        "0.17.5": "force_flex_attention should_force_flex_attention should_use_flex_attention use_flex_attention",
        "0.20.0 to 0.21.7": (
            "allow_flex_compile allow_flex_compile_backprop disable_flex_compile disable_flex_compile_backprop "
            "is_flex_compile_allowed is_flex_compile_backprop_allowed"
        ),
    },
    "natten.experimental": {
        "0.17.4 to 0.17.5": (
            "FlopCountFn na1d na1d_flop_count na1d_op_fake na1d_torch_library_op na2d na2d_flop_count na2d_op_fake "
            "na2d_torch_library_op na3d na3d_flop_count na3d_op_fake na3d_torch_library_op"
        ),
    },
    "natten.flex": {
        "0.17.5": "can_run_flex_attention flex_na1d flex_na2d flex_na3d get_flex_attention_compiled get_na_flex_mask",
    },
    "natten.flops": {
        "0.14.1 to 0.17.5": "add_natten_handle get_flops",
        "0.14.1 to 0.17.3": "av_1d_flop qk_1d_rpb_flop",
        "0.14.1 to 0.14.6": "av_flop qk_rpb_flop",
        "0.15.0 to 0.17.3": "av_2d_flop av_3d_flop qk_2d_rpb_flop qk_3d_rpb_flop",
        "0.17.0 to 0.17.3": "fna_generic_flops",
        "0.17.4 to 0.17.5": "fna_flop_count has_fvcore na_av_flop_count na_qk_flop_count",
    },
    "natten.functional": {
        "0.14.1 to 0.14.6": "NATTEN1DAVFunction NATTEN1DQKRPBFunction NATTEN2DAVFunction NATTEN2DQKRPBFunction",
        "0.14.1 to 0.17.4": "natten1dav natten1dqkrpb natten2dav natten2dqkrpb",
        "0.14.6 to 0.17.4": "natten1dqk natten2dqk",
        "0.15.0 to 0.17.5": (
            "NeighborhoodAttention1DAVAutogradFunction NeighborhoodAttention1DQKAutogradFunction "
            "NeighborhoodAttention2DAVAutogradFunction NeighborhoodAttention2DQKAutogradFunction "
            "NeighborhoodAttention3DAVAutogradFunction NeighborhoodAttention3DQKAutogradFunction NoneType libnatten "
            "make_attn_tensor_from_input na1d_av na1d_av_nested na1d_qk na1d_qk_nested na2d_av na2d_av_nested na2d_qk "
            "na2d_qk_nested na3d_av na3d_av_nested na3d_qk na3d_qk_nested"
        ),
        "0.15.0 to 0.15.1": (
            "disable_gemm_na disable_tf32 disable_tiled_na enable_gemm_na enable_tf32 enable_tiled_na get_device_cc "
            "has_bfloat has_cuda has_fp32_gemm has_fp64_gemm has_gemm has_half has_tf32_gemm na1d_qk_with_bias "
            "na2d_qk_with_bias na3d_qk_with_bias"
        ),
        "0.15.0 to 0.17.4": "natten3dav natten3dqk natten3dqkrpb",
        "0.15.1 to 0.17.5": (
            "av_cross_backward av_cross_forward check_additional_keys check_additional_values qk_cross_backward "
            "qk_cross_forward"
        ),
        "0.17.0": "CausalArg1DType CausalArg2DType CausalArg3DType",
        "0.17.0 to 0.21.7": "Dimension1DType Dimension2DType Dimension3DType check_all_args na1d na2d na3d",
        "0.17.0 to 0.17.5": (
            "FnaBackwardConfigType FnaForwardConfigType FusedNeighborhoodAttention1D FusedNeighborhoodAttention2D "
            "FusedNeighborhoodAttention3D autotune_fna check_backward_tiling_config check_tiling_config "
            "get_num_na_weights"
        ),
        "0.17.1 to 0.21.7": (
            "CausalArg1DTypeOrDed CausalArg2DTypeOrDed CausalArg3DTypeOrDed Dimension1DTypeOrDed Dimension2DTypeOrDed "
            "Dimension3DTypeOrDed"
        ),
        "0.17.3 to 0.17.5": "amp_bwd amp_fwd",
        "0.17.4 to 0.17.5": "additional_sdpa",
        "0.17.4 to 0.21.7": "merge_attentions",
        "0.17.5": (
            "can_run_flex_attention flex_na1d flex_na2d flex_na3d should_force_flex_attention should_use_flex_attention"
        ),
        "0.20.0 to 0.21.7": (
            "CausalArgTypeOrDed DimensionType DimensionTypeOrDed KernelSchedule additional_kv_tensor_checks attention "
            "check_args_against_input check_kernel_schedule choose_backend choose_fmha_backend cutlass_blackwell_fmha "
            "cutlass_blackwell_fna_generic cutlass_fmha cutlass_fna_generic cutlass_hopper_fmha "
            "cutlass_hopper_fna_generic flex_fmha flex_fna_generic fmha_tensor_checks is_self_attention "
            "na_tensor_checks neighborhood_attention_generic"
        ),
        "0.20.0 to 0.21.1": "merge_attentions_compile merge_attentions_fn",
        "0.21.5 to 0.21.7": "varlen_tensor_checks",
    },
    "natten.modules": {
        "0.20.0 to 0.21.7": (
            "NeighborhoodAttention1D NeighborhoodAttention2D NeighborhoodAttention3D NeighborhoodAttentionGeneric"
        ),
    },
    "natten.na1d": {
        "0.17.0 to 0.17.5": "NeighborhoodAttention1D",
    },
    "natten.na2d": {
        "0.17.0 to 0.17.5": "NeighborhoodAttention2D",
    },
    "natten.na3d": {
        "0.17.0 to 0.17.5": "NeighborhoodAttention3D",
    },
    "natten.natten1d": {
        "0.14.2 to 0.15.1": "NeighborhoodAttention1D",
    },
    "natten.natten2d": {
        "0.14.2 to 0.14.4": "NeighborhoodAttention",
        "0.14.2 to 0.15.1": "NeighborhoodAttention2D",
    },
    "natten.natten3d": {
        "0.15.0 to 0.15.1": "NeighborhoodAttention3D",
    },
    "natten.nattencuda": {
        "0.14.1": "NeighborhoodAttention",
    },
    "natten.nattencuda1d": {
        "0.14.1": "NeighborhoodAttention1D",
    },
    "natten.nattencuda2d": {
        "0.14.1": "NeighborhoodAttention2D",
    },
    "natten.nested": {
        "0.15.0 to 0.17.5": (
            "na1d_av_nested na1d_qk_nested na2d_av_nested na2d_qk_nested na3d_av_nested na3d_qk_nested"
        ),
    },
    "natten.types": {
        "0.17.0 to 0.21.7": (
            "CausalArg1DType CausalArg2DType CausalArg3DType CausalArgType Dimension1DType Dimension2DType "
            "Dimension3DType DimensionType NoneType"
        ),
        "0.17.0 to 0.17.5": (
            "FnaBackwardConfigType FnaForwardConfigType FnaTileShapeType create_causal_arg_from_bool "
            "create_dim_from_int"
        ),
        "0.17.1 to 0.21.7": (
            "CausalArg1DTypeOrDed CausalArg2DTypeOrDed CausalArg3DTypeOrDed Dimension1DTypeOrDed Dimension2DTypeOrDed "
            "Dimension3DTypeOrDed"
        ),
        "0.17.1 to 0.17.5": "ListOrNestedTensor",
        "0.20.0 to 0.21.7": (
            "CausalArgTypeOrDed CutlassBlackwellFmhaForwardConfigType CutlassBlackwellFnaForwardConfigType "
            "CutlassFmhaBackwardConfigType CutlassFmhaForwardConfigType CutlassFnaBackwardConfigType "
            "CutlassFnaForwardConfigType CutlassHopperFmhaForwardConfigType CutlassHopperFnaForwardConfigType "
            "DimensionTypeOrDed FlexFmhaForwardConfigType FlexFnaForwardConfigType FmhaForwardConfigType "
            "KernelSchedule QKTileShapeType"
        ),
        "0.21.0 to 0.21.7": (
            "CutlassBlackwellFmhaBackwardConfigType CutlassBlackwellFnaBackwardConfigType "
            "CutlassHopperFmhaBackwardConfigType CutlassHopperFnaBackwardConfigType"
        ),
    },
    "natten.utils": {
        "0.15.0 to 0.15.1": "NoneType",
        "0.15.0 to 0.17.5": "make_attn_tensor_from_input",
        "0.15.1 to 0.17.5": "check_additional_keys check_additional_values",
        "0.17.0 to 0.17.5": (
            "check_all_args check_backward_tiling_config check_causal_arg check_dilation_arg check_kernel_size_arg "
            "check_tiling_config get_device_cc get_num_na_weights"
        ),
        "0.17.5": "check_input_size_arg",
    },
    "natten.utils.checks": {
        "0.17.0 to 0.21.7": "check_all_args check_causal_arg check_dilation_arg check_kernel_size_arg",
        "0.17.0 to 0.17.5": "check_backward_tiling_config check_tiling_config get_num_na_weights",
        "0.17.5 to 0.21.7": "check_input_size_arg",
        "0.20.0 to 0.21.7": (
            "additional_kv_tensor_checks check_args_against_input check_kernel_schedule check_stride_arg "
            "check_tile_shape fmha_tensor_checks is_self_attention log_or_raise_error na_tensor_checks"
        ),
        "0.21.5 to 0.21.7": "varlen_tensor_checks",
    },
    "natten.utils.device": {
        "0.20.0 to 0.21.7": "get_device_cc is_cpu is_cuda is_rocm",
    },
    "natten.utils.log": {
        "0.17.0 to 0.21.7": "LogLevel get_logger",
        "0.21.5 to 0.21.7": "NattenLogger",
    },
    "natten.utils.misc": {
        "0.17.0 to 0.17.5": "get_device_cc",
    },
    "natten.utils.tensor": {
        "0.15.0 to 0.21.7": "make_attn_tensor_from_input",
        "0.15.1 to 0.21.7": "check_additional_keys check_additional_values",
    },
    "natten.utils.tuples": {
        "0.20.0 to 0.21.7": "ceil_div_int ceil_div_tuple create_causal_arg_from_bool create_dim_from_int",
        "0.21.5 to 0.21.7": "mul_tuple sub_tuple",
    },
    "natten.utils.typing": {
        "0.15.0 to 0.15.1": "NoneType",
    },
    "natten.version": {
        "0.20.0 to 0.21.7": "__version__",
    },
}

# Left out: what chooses or starts one of NATTEN's kernels, and parts from which it makes the calls that are here.
NOT_THERE = (
    "AutotunerContext autotune_fna can_run_flex_attention check_backward_tiling_config check_kernel_schedule "
    "check_tile_shape check_tiling_config choose_backend choose_fmha_backend cutlass_blackwell_fmha "
    "cutlass_blackwell_fna_generic cutlass_fmha cutlass_fna_generic cutlass_hopper_fmha cutlass_hopper_fna_generic "
    "flex_fmha flex_fna_generic get_flex_attention_compiled get_na_flex_mask libnatten "
    "FlopCountFn LogLevel MergeAttentionsAutogradFn NattenLogger additional_kv_tensor_checks additional_sdpa amp_bwd "
    "amp_fwd av_cross_backward av_cross_forward ceil_div_int ceil_div_tuple fmha_tensor_checks has_fvcore "
    "is_self_attention log_or_raise_error maybe_torch_compile merge_attentions_compile merge_attentions_fn mul_tuple "
    "na1d_flop_count na1d_op_fake na1d_torch_library_op na2d_flop_count na2d_op_fake na2d_torch_library_op "
    "na3d_flop_count na3d_op_fake na3d_torch_library_op na_tensor_checks qk_cross_backward qk_cross_forward sub_tuple "
    "varlen_tensor_checks"
)
