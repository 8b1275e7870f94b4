"""How to train: everything but the model, the data and the optimizer."""

# A period counts iterations when it is an int, and epochs when it is written "1ep".
train = dict(
    output_dir="output",
    init_checkpoint="",
    device="auto",
    seed=42,
    epochs=50,
    max_iter=None,
    max_hours=None,
    eval_period="1ep",
    log_period=20,
    amp=dict(enabled=False, dtype="float16"),
    clip_grad=dict(max_norm=0.1, norm_type=2.0),
    # What saves memory; results stay the same.
    accumulate=1,
    activation_checkpointing=dict(backbone=False, encoder=False, decoder=False),
    ema=dict(enabled=False, decay=0.9997),
    # What happens when something goes wrong.
    nonfinite="raise",
    nonfinite_limit=10,
    oom="raise",
    grace_seconds=120.0,
    checkpoint=dict(period="1ep", keep=3, best="AP", asynchronous=True),
    early_stopping=dict(patience=None, min_delta=0.0),
    wandb=dict(enabled=False, project="dn_detr", name=None, mode=None),
)
