"""An ordinary training loop, recorded: the lines marked + are all that was added to it."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import whence  # +

x, y = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
x, train, test = x.float() / 16, torch.arange(1500), torch.arange(1500, 1505)
torch.manual_seed(0)
model, loss = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)), nn.CrossEntropyLoss()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
states = {}  # + the weights after each epoch, for the query
with whence.record(model, "runs/digits", on_duplicate="skip") as recorder:  # +
    for epoch in map(str, range(3)):
        recorder.checkpoint(epoch, learning_rate=0.1)  # +
        for ids in train[torch.randperm(len(train))].split(50):
            optimizer.zero_grad()
            with recorder.batch(ids, label=y[ids]):  # + an id is your own key of an example
                loss(model(x[ids]), y[ids]).backward()
            optimizer.step()
        states[epoch] = {name: value.clone() for name, value in model.state_dict().items()}  # +
closure = lambda: loss(model(x[test]), y[test])  # noqa: E731
print(whence.query(model, "runs/digits", closure, k=3, states=states))  # +
