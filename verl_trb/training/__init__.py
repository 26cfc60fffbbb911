"""verl's trainer, worker and engine, subclassed: the frozen teacher beside the student, and the distillation loss."""
