"""Memory and traffic of training on meshes that nobody has here, from a model of a step.

Read `setups` first: what is trained, and on what. `memory` and `traffic` are the model, `checks`
holds it against compiled programs and stored measurements, and `tables` writes down what it says.

    python -m benchmarks.plan
    python -m benchmarks.plan --size 70b --mesh data=4,fsdp=8,tensor=8
"""
