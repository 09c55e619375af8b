"""The hybrid model on megatron-core: configuration, layer specs, initialisation, construction."""
