# syncbn with TensorFlow, Open MPI and Horovod, for jobs on the CPUs of one or several hosts.
#
#   docker build -f docker/cpu.Dockerfile -t syncbn:cpu .
#
# What pins the versions: requirements.txt for Python's packages, install_horovod.sh for Horovod,
# both with hashes, and for the CMake that builds it, without. Debian's packages are those of the
# day, since its mirrors keep no older ones. The base can be pinned too:
# --build-arg BASE=debian:bookworm-slim@sha256:<the digest>.
#
# Open MPI is the one from PyPI that pyproject.toml asks for, not Debian's: it is what the tests run
# with, it needs nothing from the system, and it is copied with the environment.
ARG BASE=debian:bookworm-slim

FROM ${BASE} AS builder
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
COPY constraints.txt docker/requirements.txt launch/install_horovod.sh ./
RUN pip install -q --require-hashes -r requirements.txt \
  && ./install_horovod.sh --python /opt/syncbn/bin/python --cache /tmp/horovod
COPY pyproject.toml README.md LICENSE ./
COPY benchmarks benchmarks
COPY launch launch
COPY syncbn syncbn
RUN pip install -q --no-deps --no-build-isolation .

FROM ${BASE}
# The ssh server's own keys are made when a container starts: those of the package are the same in
# every container, and public.
# hadolint ignore=DL3008
RUN apt-get update \
  && apt-get install -y --no-install-recommends openssh-client openssh-server python3 tini \
  && rm -rf /var/lib/apt/lists/* /etc/ssh/ssh_host_* \
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
