"""Actor and critic on a pole that is computed here: an optimizer step an episode, no clipping."""

import math
import random
import sys

import torch
from torch import nn
from torch.distributions import Categorical


class Policy(nn.Module):
    def __init__(self):
        super().__init__()
        self.affine = nn.Linear(2, 24)
        self.action_head = nn.Linear(24, 2)
        self.value_head = nn.Linear(24, 1)

    def forward(self, state):
        hidden = torch.relu(self.affine(state))
        return torch.softmax(self.action_head(hidden), -1), self.value_head(hidden)


def push(angle, speed, action):
    speed += 0.05 * (9.8 * math.sin(angle) + (2.0 if action else -2.0)) + random.gauss(0, 0.01)
    return angle + 0.05 * speed, speed


torch.manual_seed(543)
random.seed(543)
model = Policy()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
for episode in range(40):
    angle, speed, log_probs, values = random.uniform(-0.1, 0.1), 0.0, [], []
    while abs(angle) < 0.5 and len(values) < 60:
        probs, value = model(torch.tensor([angle, speed]))
        choice = Categorical(probs)
        action = choice.sample()
        log_probs.append(choice.log_prob(action))
        values.append(value)
        angle, speed = push(angle, speed, action.item())
    returns = [sum(0.99**k for k in range(len(values) - t)) for t in range(len(values))]
    returns = torch.tensor(returns)
    advantage = returns - torch.cat(values).detach()
    policy_loss = -(torch.stack(log_probs) * advantage).sum()
    value_loss = nn.functional.smooth_l1_loss(torch.cat(values), returns)
    optimizer.zero_grad()
    (policy_loss + value_loss).backward()
    optimizer.step()
print("last episode", len(values), "steps", random.random())
torch.save((model.state_dict(), optimizer.state_dict(), torch.get_rng_state()), sys.argv[1])
