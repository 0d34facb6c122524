"""The bundled trainer: config -> data -> loop -> artifacts. No import of `launcher`, `infra`."""
