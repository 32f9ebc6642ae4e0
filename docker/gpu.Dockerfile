# syncbn with TensorFlow, Open MPI and Horovod over NCCL, for jobs on the GPUs of one or several
# hosts.
#
#   docker build -f docker/gpu.Dockerfile -t syncbn:gpu .
#
# NOT BUILT AND NOT RUN: it has only been linted, and compared with cpu.Dockerfile, which is tested.
#
# TensorFlow has CUDA, cuDNN and NCCL from PyPI (tensorflow[and-cuda]): the versions that it asks
# for, which a base image seldom has. Horovod links the CUDA runtime and NCCL of the base into
# itself, statically, as it does by default, so that there is no second libnccl.so to mix up with
# TensorFlow's. What is left to the final stage is to let the host's driver in.
ARG CUDA=12.9.1
ARG SYSTEM=ubuntu24.04

FROM nvidia/cuda:${CUDA}-devel-${SYSTEM} AS builder
# hadolint ignore=DL3008
RUN apt-get update \
  && apt-get install -y --no-install-recommends ca-certificates g++ make python3-venv \
  && rm -rf /var/lib/apt/lists/* \
  && python3 -m venv /opt/syncbn
ENV PATH=/opt/syncbn/bin:$PATH \
  PIP_CONSTRAINT=/src/constraints.txt \
  PIP_DISABLE_PIP_VERSION_CHECK=1 \
  PIP_NO_CACHE_DIR=1
WORKDIR /src
# What there is from PyPI, by its hashes, and Horovod, in a layer of their own: a change of the code
# does not rebuild it.
COPY constraints.txt docker/requirements-gpu.txt launch/install_horovod.sh ./
RUN pip install -q --require-hashes -r requirements-gpu.txt \
  && ./install_horovod.sh --nccl --python /opt/syncbn/bin/python --cache /tmp/horovod
COPY pyproject.toml README.md LICENSE ./
COPY benchmarks benchmarks
COPY launch launch
COPY syncbn syncbn
RUN pip install -q --no-deps --no-build-isolation .

FROM nvidia/cuda:${CUDA}-base-${SYSTEM}
# The ssh server's own keys are made when a container starts: those of the package are the same in
# every container, and public. The base has a user 1000 of its own.
# hadolint ignore=DL3008
RUN apt-get update \
  && apt-get install -y --no-install-recommends openssh-client openssh-server python3 tini \
  && rm -rf /var/lib/apt/lists/* /etc/ssh/ssh_host_* \
  && userdel --remove ubuntu \
  && useradd --uid 1000 --create-home --shell /bin/bash syncbn \
  && install -d -o syncbn -g syncbn -m 700 /home/syncbn/.ssh \
  && install -d -o syncbn -g syncbn /workspace
COPY --from=builder /opt/syncbn /opt/syncbn
COPY docker/openmpi.conf /opt/syncbn/etc/openmpi-mca-params.conf
COPY docker/ssh.conf /etc/ssh/ssh_config.d/syncbn.conf
COPY docker/sshd.conf /etc/ssh/sshd_config.d/syncbn.conf
COPY docker/sshd.sh /usr/local/bin/sshd.sh
WORKDIR /workspace
COPY launch launch
ENV PATH=/opt/syncbn/bin:$PATH \
  OPAL_PREFIX=/opt/syncbn
USER 1000:1000
EXPOSE 2222
# Open MPI's daemons leave their parents; something has to reap them.
ENTRYPOINT ["tini", "--"]
CMD ["sshd.sh"]
