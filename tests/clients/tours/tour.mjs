// As tour.py, for the tours of npm clients: `node openai_chat_tour.mjs URL`.

export const SCHEMA = {
  type: "object", properties: { path: { type: "string" } }, required: ["path"], additionalProperties: false,
};
export const says = (...answers) => `Go on: ⟦${answers.join("‖")}⟧`;
export const call = (name, args) => `call ${name} ${JSON.stringify(args)}`;

export function check(value, what) {
  if (!value) throw new Error(`not so: ${what}`);
}

export function same(found, wanted) {
  const [a, b] = [JSON.stringify(found), JSON.stringify(wanted)];
  if (a !== b) throw new Error(`${a} is not ${b}`);
}

export async function run(features) {
  for (const [name, visit] of Object.entries(features)) {
    let error = null;
    const start = Date.now();
    try {
      await visit(process.argv[2]);
    } catch (raised) {
      error = raised.stack ?? String(raised);
    }
    console.log(JSON.stringify({ name, error, seconds: (Date.now() - start) / 1000 }));
  }
}
