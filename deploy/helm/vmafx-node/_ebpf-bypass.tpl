{{- /* Of the pod: rclone and the programs that are tracked are processes of the node. */}}
{{- define "ebpfBypass.pod" -}}
{{- if .Values.ebpfBypass.enabled }}
hostPID: true
{{- end }}
{{- end }}

{{- /* Of the container that reads clips: its environment. */}}
{{- define "ebpfBypass.env" -}}
{{- if .Values.ebpfBypass.enabled }}
- name: VMAFX_EBPF_BYPASS
  value: "1"
- name: VMAFX_BYPASS_SOCKET
  value: /run/vmafx-bypass/bypass.sock
{{- end }}
{{- end }}

{{- /* Of the same container: its volumeMounts. */}}
{{- define "ebpfBypass.volumeMounts" -}}
{{- if .Values.ebpfBypass.enabled }}
- name: ebpf-bypass-socket
  mountPath: /run/vmafx-bypass
  readOnly: true
- name: ebpf-bypass-mounts
  mountPath: {{ .Values.ebpfBypass.mountRoot }}
  mountPropagation: HostToContainer
  readOnly: true
{{- end }}
{{- end }}

{{- /* Of the pod: one more container. */}}
{{- define "ebpfBypass.container" -}}
{{- with .Values.ebpfBypass }}
{{- if .enabled }}
- name: ebpf-bypass
  image: {{ .image | quote }}
  args:
    - run
    {{- range .prefixes }}
    - --prefix={{ . }}
    {{- end }}
    - --wait
    # Each pod on a node has pins of its own.
    - --pin-dir=/sys/fs/bpf/$(POD_UID)
    - --no-events
    - --socket=/run/vmafx-bypass/bypass.sock
    - --socket-owner=:{{ int64 .group }}
    - --copy-budget={{ .copyBudget }}
  env:
    - name: VMAFX_EBPF_BYPASS
      value: "1"
    - name: POD_UID
      valueFrom:
        fieldRef:
          fieldPath: metadata.uid
  securityContext:
    privileged: false
    allowPrivilegeEscalation: false
    readOnlyRootFilesystem: true
    runAsUser: 0
    runAsNonRoot: false
    capabilities:
      drop:
        - ALL
      add:
        - BPF
        - PERFMON
        - DAC_READ_SEARCH
        - SYS_PTRACE
    seccompProfile:
      {{- toYaml .seccompProfile | nindent 6 }}
    {{- with .appArmorProfile }}
    appArmorProfile:
      {{- toYaml . | nindent 6 }}
    {{- end }}
  resources:
    {{- toYaml .resources | nindent 4 }}
  volumeMounts:
    - name: ebpf-bypass-socket
      mountPath: /run/vmafx-bypass
    - name: ebpf-bypass-mounts
      mountPath: {{ .mountRoot }}
      mountPropagation: HostToContainer
      readOnly: true
    - name: ebpf-bypass-bpffs
      mountPath: /sys/fs/bpf
{{- end }}
{{- end }}
{{- end }}

{{- /* Of the pod: its volumes. */}}
{{- define "ebpfBypass.volumes" -}}
{{- if .Values.ebpfBypass.enabled }}
- name: ebpf-bypass-socket
  emptyDir: {}
- name: ebpf-bypass-mounts
  hostPath:
    path: {{ .Values.ebpfBypass.mountRoot }}
    type: Directory
- name: ebpf-bypass-bpffs
  hostPath:
    path: /sys/fs/bpf
    type: Directory
{{- end }}
{{- end }}
