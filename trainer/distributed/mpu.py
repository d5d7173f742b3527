"""Megatron-core's groups under the names that DeepSpeed expects of its `mpu` argument, which is this module.

DeepSpeed 0.19 uses Megatron's old interface (`get_model_parallel_*`), which megatron-core no longer has. Model parallel means
tensor parallel here, because there is no pipeline.
"""

from tandem.trainer.distributed.megatron import parallel_state

get_data_parallel_group = parallel_state.get_data_parallel_group
get_data_parallel_rank = parallel_state.get_data_parallel_rank
get_data_parallel_world_size = parallel_state.get_data_parallel_world_size
get_tensor_model_parallel_group = parallel_state.get_tensor_model_parallel_group
get_tensor_model_parallel_rank = parallel_state.get_tensor_model_parallel_rank
get_tensor_model_parallel_src_rank = parallel_state.get_tensor_model_parallel_src_rank
get_tensor_model_parallel_world_size = parallel_state.get_tensor_model_parallel_world_size
get_model_parallel_group = get_tensor_model_parallel_group
get_model_parallel_rank = get_tensor_model_parallel_rank
get_model_parallel_world_size = get_tensor_model_parallel_world_size
get_pipeline_model_parallel_world_size = parallel_state.get_pipeline_model_parallel_world_size
get_pipeline_model_parallel_rank = parallel_state.get_pipeline_model_parallel_rank
