"""What an SGLang server loads of this project, by SGLANG_EXTERNAL_MM_PROCESSOR_PACKAGE
and (models/) SGLANG_EXTERNAL_MODEL_PACKAGE.

Only the server imports these modules; the trainer talks HTTP to it.
"""
