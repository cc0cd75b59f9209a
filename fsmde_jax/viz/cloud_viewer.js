"use strict";
// Point clouds to turn with a mouse or a finger; one <canvas data-cloud="id of a script with base64 points"> each.
// A point is x, y, z float32 (metres, z up) and red, green, blue, 255 as bytes: 16 bytes.
for (const canvas of document.querySelectorAll("canvas[data-cloud]")) {
  const gl = canvas.getContext("webgl", { antialias: true, preserveDrawingBuffer: true });
  if (!gl) {
    canvas.replaceWith(Object.assign(document.createElement("p"), { textContent: "This browser has no WebGL, so the point cloud is not shown." }));
    continue;
  }
  const text = atob(document.getElementById(canvas.dataset.cloud).textContent.trim());
  const bytes = Uint8Array.from(text, (c) => c.charCodeAt(0));
  const shader = (kind, source) => {
    const made = gl.createShader(kind);
    gl.shaderSource(made, source);
    gl.compileShader(made);
    return made;
  };
  const program = gl.createProgram();
  gl.attachShader(program, shader(gl.VERTEX_SHADER, `
    attribute vec3 place; attribute vec4 colour; uniform mat4 view; uniform float size; varying vec4 shade;
    void main() { gl_Position = view * vec4(place, 1.0); gl_PointSize = max(1.5, size / gl_Position.w); shade = colour; }`));
  gl.attachShader(program, shader(gl.FRAGMENT_SHADER, `
    precision mediump float; varying vec4 shade; void main() { gl_FragColor = shade; }`));
  gl.linkProgram(program);
  gl.useProgram(program);
  gl.bindBuffer(gl.ARRAY_BUFFER, gl.createBuffer());
  gl.bufferData(gl.ARRAY_BUFFER, bytes, gl.STATIC_DRAW);
  for (const [name, count, kind, normal, offset] of [["place", 3, gl.FLOAT, false, 0], ["colour", 4, gl.UNSIGNED_BYTE, true, 12]]) {
    const at = gl.getAttribLocation(program, name);
    gl.enableVertexAttribArray(at);
    gl.vertexAttribPointer(at, count, kind, normal, 16, offset);
  }
  gl.enable(gl.DEPTH_TEST);
  gl.clearColor(0.09, 0.09, 0.09, 1);

  let turn = Math.PI, tilt = 0.6, distance = 35;
  const draw = () => {
    const ratio = window.devicePixelRatio || 1;
    canvas.width = canvas.clientWidth * ratio;
    canvas.height = canvas.clientHeight * ratio;
    gl.viewport(0, 0, canvas.width, canvas.height);
    const eye = [distance * Math.cos(tilt) * Math.cos(turn), distance * Math.cos(tilt) * Math.sin(turn), distance * Math.sin(tilt)];
    const unit = (v) => { const n = Math.hypot(...v); return v.map((x) => x / n); };
    const cross = (a, b) => [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]];
    const dot = (a, b) => a[0] * b[0] + a[1] * b[1] + a[2] * b[2];
    const back = unit(eye), right = unit(cross([0, 0, 1], back)), up = cross(back, right);
    const f = 1.4, aspect = canvas.width / canvas.height, near = 0.5, far = 500;
    const a = (far + near) / (near - far), b = (2 * far * near) / (near - far);
    const rows = [right, up, back].map((axis) => [...axis, -dot(axis, eye)]);
    const view = new Float32Array(16);
    for (let c = 0; c < 4; c++) {
      view[4 * c] = (f / aspect) * rows[0][c];
      view[4 * c + 1] = f * rows[1][c];
      view[4 * c + 2] = a * rows[2][c] + (c === 3 ? b : 0);
      view[4 * c + 3] = -rows[2][c];
    }
    gl.uniformMatrix4fv(gl.getUniformLocation(program, "view"), false, view);
    gl.uniform1f(gl.getUniformLocation(program, "size"), 0.18 * canvas.height);
    gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
    gl.drawArrays(gl.POINTS, 0, bytes.length / 16);
  };

  const fingers = new Map();
  canvas.addEventListener("pointerdown", (e) => { fingers.set(e.pointerId, [e.clientX, e.clientY]); canvas.setPointerCapture(e.pointerId); });
  for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, (e) => fingers.delete(e.pointerId));
  canvas.addEventListener("pointermove", (e) => {
    const before = fingers.get(e.pointerId);
    if (!before) return;
    const spread = () => { const [p, q] = [...fingers.values()]; return Math.hypot(p[0] - q[0], p[1] - q[1]); };
    const was = fingers.size === 2 ? spread() : 0;
    fingers.set(e.pointerId, [e.clientX, e.clientY]);
    if (was) distance *= was / Math.max(spread(), 1);
    else {
      turn -= 0.006 * (e.clientX - before[0]);
      tilt = Math.min(1.55, Math.max(-0.2, tilt + 0.006 * (e.clientY - before[1])));
    }
    distance = Math.min(200, Math.max(3, distance));
    draw();
  });
  canvas.addEventListener("wheel", (e) => { e.preventDefault(); distance = Math.min(200, Math.max(3, distance * Math.exp(0.001 * e.deltaY))); draw(); }, { passive: false });
  window.addEventListener("resize", draw);
  draw();
}
