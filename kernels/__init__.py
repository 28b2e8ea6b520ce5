"""Number formats and expert kernels: tensors to codes to bits. Imports torch only."""
