"""vLLM as a sampler of blended policies: the teacher is vLLM's target model, the student its draft model."""
