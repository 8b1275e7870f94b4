"""torchvision's schedule: 26 epochs, with a tenth of the learning rate from 16 and from 22 on."""

from .detection import dataloader, lr_schedule, optimizer, train

lr_schedule.milestones = [16, 22]
train.epochs = 26
