"""How to train: everything but the model, the data and the optimizer."""

# A period counts iterations when it is an int, and epochs when it is written "1ep".
train = dict(
    output_dir="output",
    init_checkpoint="",
    device="auto",
    seed=42,
    epochs=50,
    max_iter=None,
    eval_period="1ep",
    log_period=20,
    amp=dict(enabled=False, dtype="float16"),
    clip_grad=dict(max_norm=0.1, norm_type=2.0),
    checkpoint=dict(period="1ep", keep=3),
)
